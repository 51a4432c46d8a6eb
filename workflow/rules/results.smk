# What is made of all runs: tables, figures, and the tracking server's copy.
rule contents:
    output:
        f"{ROOT}/report_spec.json",
    log:
        f"{ROOT}/logs/contents.log",
    conda:
        "../../environment.yml"
    params:
        contents=PLAN.contents,
    shell:
        "printf '%s\\n' {params.contents:q} > {output:q} 2> {log:q}"


rule compare:
    input:
        contents=rules.contents.output,
        claims="claims.yaml",
        descriptions=PLAN.files("run.json"),
        journals=PLAN.files("journal.jsonl", trained=True),
        scores=[f for name in PLAN.metrics_files for f in PLAN.files(name, judged=True)],
        trajectory_rewards=PLAN.correlated,
        samples=PLAN.files("samples.safetensors", judged=True),
    output:
        report(
            PLAN.results_of("tables", ["csv", "html", "md", "parquet", "tex"]),
            category="Tables",
            caption="../report/tables.rst",
        ),
        report(
            PLAN.results_of("figures", ["png", "pdf"]),
            category="Figures",
            caption="../report/figures.rst",
        ),
        PLAN.results_of("provenance", ["json"]),
        report(
            multiext(f"{ROOT}/claims", ".md", ".json"),
            category="Claims",
            caption="../report/claims.rst",
        ),
    log:
        f"{ROOT}/logs/compare.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * (1 + attempt),
    shell:
        'python -m tafs.report.build "$(dirname {input.contents:q})" > {log:q} 2>&1'


rule track:
    input:
        descriptions=PLAN.files("run.json", trained=True),
        journals=PLAN.files("journal.jsonl", trained=True),
        scores=[
            f for name in PLAN.metrics_files for f in PLAN.files(name, trained=True)
        ],
    output:
        touch(f"{ROOT}/tracked"),
    log:
        f"{ROOT}/logs/track.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * (1 + attempt),
    params:
        store=f"{PLAN.results}/mlflow",
        runs=PLAN.files("", trained=True),
    shell:
        "python -m tafs.tracking.cli sync --store {params.store:q} {params.runs:q} > {log:q} 2>&1"
