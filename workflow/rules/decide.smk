# `snakemake decide`: seeds are added where claims are open (tafs/report/decide.py). A look is a
# checkpoint, because its result says which runs the next one needs. Looks run beside Snakemake
# itself: a checkpoint in a Slurm job would take the rules of all other jobs into account again.
rule decide_spec:
    output:
        f"{ROOT}/decide_spec.json",
    log:
        f"{ROOT}/logs/decide_spec.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        spec=GRAPH.plan.decide.to_json() if GRAPH.plan.decide else "",
    shell:
        "printf '%s\\n' {params.spec:q} > {output:q} 2> {log:q}"


for number, look in enumerate(GRAPH.looks, start=1):

    checkpoint:
        name:
            look
        input:
            lambda wildcards, look=look: SESSION.look_inputs(look, checkpoints),
            spec=rules.decide_spec.output,
            claims="claims.yaml",
        output:
            GRAPH.output_files(look),
        log:
            f"{ROOT}/logs/{look}.log",
        localrule: True
        conda:
            "../../environment.yml"
        params:
            number=number,
        shell:
            'python -m tafs.report.decide "$(dirname {input.spec:q})" {params.number} > {log:q} 2>&1'


rule decide:
    input:
        GRAPH.input_files("decide"),
    localrule: True
