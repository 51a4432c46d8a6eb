# The hyperparameter search, `snakemake tune`; it is not part of `all`.
rule tune_method:
    output:
        table=f"{ROOT}/tuning/{{method}}.csv",
        best=f"{ROOT}/tuning/{{method}}.best.yaml",
    log:
        f"{ROOT}/logs/tune/{{method}}.log",
    conda:
        "../../environment.yml"
    resources:
        **GRAPH.resources("tune_method"),  # trains and scores in one process
    params:
        scale=GRAPH.plan.config.scale,
        results=subpath(output.table, ancestor=3),
    shell:
        "python -m tafs.tuning --scale {params.scale:q} --results {params.results:q} "
        "--only {wildcards.method:q} > {log:q} 2>&1"


rule tune:
    input:
        expand(f"{ROOT}/tuning/{{method}}.csv", method=GRAPH.searched_methods),
