# One run: its description, its training, its evaluation.
rule describe:
    output:
        f"{ROOT}/runs/{{run}}/run.json",
    log:
        f"{ROOT}/logs/describe/{{run}}.log",
    # Before all else, so that every training can start early.
    priority: 20
    conda:
        "../../environment.yml"
    params:
        description=lambda wildcards: PLAN.description(wildcards.run),
    shell:
        "printf '%s\\n' {params.description:q} > {output:q} 2> {log:q}"


# Beside run.json, so that judging a run otherwise does not train it again.
rule describe_evaluation:
    output:
        f"{ROOT}/runs/{{run}}/evaluation.json",
    log:
        f"{ROOT}/logs/describe_evaluation/{{run}}.log",
    priority: 20
    conda:
        "../../environment.yml"
    params:
        evaluation=lambda wildcards: PLAN.evaluation(wildcards.run),
    shell:
        "printf '%s\\n' {params.evaluation:q} > {output:q} 2> {log:q}"


rule train:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        # An edited method reruns its own runs and no other's.
        method=lambda wildcards: PLAN.method_source(wildcards.run),
        fetched=lambda wildcards: PLAN.fetched(wildcards.run),
    output:
        adapter=f"{ROOT}/runs/{{run}}/adapter.safetensors",
        journal=f"{ROOT}/runs/{{run}}/journal.jsonl",
        snapshots=directory(f"{ROOT}/runs/{{run}}/snapshots"),
    log:
        f"{ROOT}/logs/train/{{run}}.log",
    # The longest first, so that no core waits for a late one.
    priority: 10
    conda:
        "../../environment.yml"
    threads: PLAN.settings.active.processes
    resources:
        **PLAN.needs("train"),
        runtime=0,  # minutes; no limit, unless a profile sets one
    shell:
        # Before its time is over it saves its state and asks to be continued.
        "TAFS_MINUTES={resources.runtime} TAFS_STARTED=$(date +%s) "
        'python -m tafs.runtime.launch "$(dirname {input.run:q})" > {log:q} 2>&1'


rule evaluate:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        evaluation=f"{ROOT}/runs/{{run}}/evaluation.json",
        adapters=lambda wildcards: PLAN.adapters(wildcards.run),
        fetched=lambda wildcards: PLAN.fetched(wildcards.run, judging=True),
        check=ancient(PLAN.reward_check),
    output:
        temp(PLAN.images),
        scores=f"{ROOT}/runs/{{run}}/scores.parquet",
        samples=f"{ROOT}/runs/{{run}}/samples.safetensors",
    log:
        f"{ROOT}/logs/evaluate/{{run}}.log",
    group:
        PLAN.short
    conda:
        "../../environment.yml"
    resources:
        **PLAN.needs("evaluate"),
        runtime=0,  # minutes; no limit, unless a profile sets one
    shell:
        "TAFS_MINUTES={resources.runtime} TAFS_STARTED=$(date +%s) "
        'python -m tafs.evaluation.evaluate "$(dirname {input.run:q})" > {log:q} 2>&1'


rule trajectory_rewards:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        evaluation=f"{ROOT}/runs/{{run}}/evaluation.json",
        adapters=lambda wildcards: PLAN.adapters(wildcards.run),
        fetched=lambda wildcards: PLAN.fetched(wildcards.run, judging=True),
        check=ancient(PLAN.reward_check),
    output:
        f"{ROOT}/runs/{{run}}/trajectory_rewards.parquet",
    log:
        f"{ROOT}/logs/trajectory_rewards/{{run}}.log",
    conda:
        "../../environment.yml"
    resources:
        **PLAN.needs("evaluate"),
    shell:
        'python -m tafs.evaluation.trajectory_rewards "$(dirname {input.run:q})" > {log:q} 2>&1'


# A metric behind a server judges the images afterwards, so that the server has the GPUs.
rule score_served:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        evaluation=f"{ROOT}/runs/{{run}}/evaluation.json",
        images=f"{ROOT}/runs/{{run}}/images.zip",
        fetched=PLAN.served,
        check=ancient(PLAN.reward_check),
    output:
        f"{ROOT}/runs/{{run}}/served_scores.parquet",
    log:
        f"{ROOT}/logs/score_served/{{run}}.log",
    conda:
        "../../environment.yml"
    resources:
        **PLAN.needs("score_served"),
    shell:
        'python -m tafs.evaluation.served "$(dirname {input.run:q})" > {log:q} 2>&1'
