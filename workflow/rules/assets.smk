# Downloads of pinned files, and a check that the reward models score as they did when pinned.
rule fetch:
    output:
        f"{ROOT}/resources/{{resource}}",
    log:
        f"{ROOT}/logs/fetch/{{resource}}.log",
    priority: 30
    conda:
        "../../environment.yml"
    params:
        lock=GRAPH.scale.lock,
        digest=lambda wildcards: GRAPH.locked(wildcards.resource),
    shell:
        # The only rule that uses the network.
        "HF_HUB_OFFLINE=0 python -m tafs.assets.download fetch --lock {params.lock:q} "
        "{wildcards.resource:q} > {log:q} 2>&1 && printf '%s\\n' {params.digest:q} > {output:q}"


rule check_rewards:
    input:
        run=f"{ROOT}/runs/{GRAPH.check_run}/run.json",
        others=GRAPH.input_files("check_rewards"),
    output:
        f"{ROOT}/reward_check.json",
    log:
        f"{ROOT}/logs/check_rewards.log",
    priority: 30
    conda:
        "../../environment.yml"
    resources:
        **GRAPH.resources("check_rewards"),
    shell:
        'python -m tafs.evaluation.check_rewards "$(dirname {input.run:q})" {output:q} > {log:q} 2>&1'
