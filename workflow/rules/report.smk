# Tables, figures and claims of all runs, and their copy in MLflow.
rule report_spec:
    output:
        f"{ROOT}/report_spec.json",
    log:
        f"{ROOT}/logs/report_spec.log",
    conda:
        "../../environment.yml"
    params:
        spec=GRAPH.plan.report.to_json(),
    shell:
        "printf '%s\\n' {params.spec:q} > {output:q} 2> {log:q}"


rule compare:
    input:
        spec=rules.report_spec.output,
        claims="claims.yaml",
        runs=GRAPH.input_files("compare"),
    output:
        # Files with labels appear in Snakemake's own report.
        [
            report(
                f"{ROOT}/tables/{name}.html",
                category="Tables",
                caption="../report/tables.rst",
                labels={"table": name},
            )
            for name in GRAPH.tables
        ],
        [
            report(
                f"{ROOT}/figures/{name}.png",
                category="Figures",
                caption="../report/figures.rst",
                labels={"figure": name},
            )
            for name in GRAPH.figures
        ],
        report(
            f"{ROOT}/claims.md",
            category="Claims",
            caption="../report/claims.rst",
            labels={"claims": "verdicts"},
        ),
        GRAPH.output("tables", GRAPH.tables, ["csv", "md", "parquet", "tex"]),
        GRAPH.output("figures", GRAPH.figures, ["pdf"]),
        GRAPH.output("provenance", GRAPH.tables, ["json"]),
        f"{ROOT}/claims.json",
        report(
            directory(f"{ROOT}/report"),
            htmlindex="index.html",
            category="Page",
            caption="../report/page.rst",
            labels={"page": "all results"},
        ),
    log:
        f"{ROOT}/logs/compare.log",
    benchmark:
        f"{ROOT}/benchmarks/compare.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * (1 + attempt),
    shell:
        'python -m tafs.report.build "$(dirname {input.spec:q})" > {log:q} 2>&1'


# A failed copy does not fail the workflow; `tafs sync` repeats it.
rule track:
    input:
        GRAPH.input_files("track"),
    output:
        f"{ROOT}/tracked.html",
    log:
        f"{ROOT}/logs/track.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * (1 + attempt),
    params:
        store=f"{GRAPH.results}/mlflow",
        runs=[GRAPH.folder(run) for run in GRAPH.plan.runs],
    shell:
        "python -m tafs.tracking.cli sync --best-effort --store {params.store:q} "
        '--receipt "$(dirname {output:q})" --page {output:q} {params.runs:q} > {log:q} 2>&1'
