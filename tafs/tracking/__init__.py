"""Mirrors the runs to MLflow; nothing in the suite reads from there."""

import os

# Read by MLflow when it is imported.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A dead server costs seconds. A request that MLflow repeats could create a run twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # No connection outlives its use: the store may be deleted while a process keeps syncing.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
}
os.environ.update(ENVIRONMENT)
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
