# What is made of all runs: tables, figures, and the tracking server's copy.
rule compare:
    input:
        descriptions=PLAN.files("run.json"),
        journals=PLAN.files("journal.jsonl", trained=True),
        scores=PLAN.files("scores.parquet"),
        samples=PLAN.files("samples.safetensors"),
    output:
        report(
            expand(f"{ROOT}/tables/table2.{{suffix}}", suffix=["csv", "md", "tex"]),
            category="Tables",
            caption="../report/table2.rst",
        ),
        report(
            expand(
                f"{ROOT}/figures/{{name}}.{{suffix}}",
                name=["figure4", "learning_curves", "image_grid"],
                suffix=["png", "pdf"],
            ),
            category="Figures",
            caption="../report/figures.rst",
        ),
    log:
        f"{ROOT}/logs/compare.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=2000,
    params:
        root=subpath(output[0], ancestor=2),
    shell:
        "python -m tafs.report {params.root:q} {input.descriptions:q} > {log:q} 2>&1"


rule track:
    input:
        descriptions=PLAN.files("run.json", trained=True),
        journals=PLAN.files("journal.jsonl", trained=True),
        scores=PLAN.files("scores.parquet", trained=True),
    output:
        touch(f"{ROOT}/tracked"),
    log:
        f"{ROOT}/logs/track.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=2000,
    params:
        store=f"{PLAN.results}/mlflow",
        runs=PLAN.files("", trained=True),
    shell:
        "python -m tafs.tracking sync --store {params.store:q} {params.runs:q} > {log:q} 2>&1"
