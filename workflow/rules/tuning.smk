# The hyperparameter search, `snakemake tune`; it is not part of `all`.
rule tune_method:
    output:
        f"{ROOT}/tuning/{{method}}.csv",
    log:
        f"{ROOT}/logs/tune/{{method}}.log",
    conda:
        "../../environment.yml"
    resources:
        **GRAPH.resources("tune_method"),  # trains and scores in one process
    params:
        scale=GRAPH.plan.config.scale,
        results=subpath(output[0], ancestor=3),
    shell:
        "python -m tafs.tuning --scale {params.scale:q} --results {params.results:q} "
        "--only {wildcards.method:q} > {log:q} 2>&1"


rule tune:
    input:
        expand(f"{ROOT}/tuning/{{method}}.csv", method=GRAPH.searched_methods),
