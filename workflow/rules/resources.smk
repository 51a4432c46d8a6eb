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


rule check_rewards:
    input:
        run=f"{ROOT}/runs/{PLAN.check_run}/run.json",
        evaluation=f"{ROOT}/runs/{PLAN.check_run}/evaluation.json",
        fetched=PLAN.scored + PLAN.served,
    output:
        f"{ROOT}/reward_check.json",
    log:
        f"{ROOT}/logs/check_rewards.log",
    priority: 30
    conda:
        "../../environment.yml"
    resources:
        **PLAN.needs("check_rewards"),
    shell:
        'python -m tafs.evaluation.check_rewards "$(dirname {input.run:q})" {output:q} > {log:q} 2>&1'
