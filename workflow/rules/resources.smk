# What the hub's models need before any run: files on the disk, and rewards that score as they did.
rule fetch:
    output:
        f"{ROOT}/resources/{{resource}}",
    log:
        f"{ROOT}/logs/fetch/{{resource}}.log",
    priority: 30
    conda:
        "../../environment.yml"
    params:
        lock=PLAN.lock,
        digest=lambda wildcards: PLAN.locked(wildcards.resource),
    shell:
        # The one job that may use the network.
        "HF_HUB_OFFLINE=0 python -m tafs.assets.download fetch --lock {params.lock:q} "
        "{wildcards.resource:q} > {log:q} 2>&1 && printf '%s\\n' {params.digest:q} > {output:q}"


rule canary:
    input:
        run=f"{ROOT}/runs/{PLAN.canary_run}/run.json",
        evaluation=f"{ROOT}/runs/{PLAN.canary_run}/evaluation.json",
        fetched=PLAN.scored + PLAN.served,
    output:
        f"{ROOT}/canary.json",
    log:
        f"{ROOT}/logs/canary.log",
    priority: 30
    conda:
        "../../environment.yml"
    resources:
        **PLAN.needs("canary"),
    shell:
        'python -m tafs.evaluation.check_rewards "$(dirname {input.run:q})" {output:q} > {log:q} 2>&1'
