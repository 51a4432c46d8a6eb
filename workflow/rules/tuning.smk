# The hyperparameter search: `snakemake tune`. It is no part of `all`.
rule tune_method:
    output:
        f"{ROOT}/tuning/{{method}}.csv",
    log:
        f"{ROOT}/logs/tune/{{method}}.log",
    conda:
        "../../environment.yml"
    resources:
        **PLAN.needs("evaluate"),  # one process, which trains and scores
    params:
        scale=PLAN.settings.scale,
        results=subpath(output[0], ancestor=3),
    shell:
        "python -m tafs.tuning --scale {params.scale:q} --results {params.results:q} "
        "--only {wildcards.method:q} > {log:q} 2>&1"


rule tune:
    input:
        expand(f"{ROOT}/tuning/{{method}}.csv", method=PLAN.tuned),
