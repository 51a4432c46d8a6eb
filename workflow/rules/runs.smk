# One run: its specs, training and evaluation. Contents, not times, decide what runs
# (tafs/orchestration/verdicts.py).
rule describe:
    output:
        f"{ROOT}/runs/{{run}}/run.json",
    log:
        f"{ROOT}/logs/describe/{{run}}.log",
    priority: 20  # first, so that every training can start early
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: GRAPH.runs[wildcards.run].to_json(),
    shell:
        "printf '%s\\n' {params.spec:q} > {output:q} 2> {log:q}"


# A file of its own, so that changing the evaluation does not retrain the run.
rule describe_evaluation:
    output:
        f"{ROOT}/runs/{{run}}/evaluation.json",
    log:
        f"{ROOT}/logs/describe_evaluation/{{run}}.log",
    priority: 20
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: GRAPH.evaluations[wildcards.run].to_json(),
    shell:
        "printf '%s\\n' {params.spec:q} > {output:q} 2> {log:q}"


rule train:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        others=lambda wildcards: GRAPH.input_files("train", wildcards.run),
    output:
        adapter=f"{ROOT}/runs/{{run}}/adapter.safetensors",
        journal=f"{ROOT}/runs/{{run}}/journal.jsonl",
        snapshots=directory(f"{ROOT}/runs/{{run}}/snapshots"),
    log:
        f"{ROOT}/logs/train/{{run}}.log",
    benchmark:
        f"{ROOT}/benchmarks/train/{{run}}.tsv"
    priority: 10  # the longest jobs first, so that no core waits for a late one
    conda:
        "../../environment.yml"
    threads: GRAPH.scale.processes
    resources:
        **GRAPH.resources("train"),
        runtime=0,  # minutes; 0: no limit, unless a profile sets one
    shell:
        # Near the time limit it saves its state and exits with the code of errors.CONTINUE.
        'python -m tafs.runtime.launch "$(dirname {input.run:q})" '
        "--processes={resources.train_processes} --nodes={resources.train_nodes} "
        "--minutes={resources.runtime} --started=$(date +%s) > {log:q} 2>&1"


rule evaluate:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        others=lambda wildcards: GRAPH.input_files("evaluate", wildcards.run),
    output:
        temp(GRAPH.images),
        scores=f"{ROOT}/runs/{{run}}/scores.parquet",
        samples=f"{ROOT}/runs/{{run}}/samples.safetensors",
        samplers=f"{ROOT}/runs/{{run}}/samplers.json",
    log:
        f"{ROOT}/logs/evaluate/{{run}}.log",
    benchmark:
        f"{ROOT}/benchmarks/evaluate/{{run}}.tsv"
    group:
        GRAPH.group
    conda:
        "../../environment.yml"
    threads: GRAPH.scale.processes_of("evaluate")
    resources:
        **GRAPH.resources("evaluate"),
        runtime=0,  # minutes; 0: no limit, unless a profile sets one
    shell:
        'python -m tafs.evaluation.evaluate "$(dirname {input.run:q})" '
        "--processes {resources.evaluate_processes} "
        "--minutes {resources.runtime} --started $(date +%s) > {log:q} 2>&1"


rule trajectory_rewards:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        others=lambda wildcards: GRAPH.input_files("trajectory_rewards", wildcards.run),
    output:
        f"{ROOT}/runs/{{run}}/trajectory_rewards.parquet",
        f"{ROOT}/runs/{{run}}/trajectories.safetensors",
    log:
        f"{ROOT}/logs/trajectory_rewards/{{run}}.log",
    benchmark:
        f"{ROOT}/benchmarks/trajectory_rewards/{{run}}.tsv"
    conda:
        "../../environment.yml"
    resources:
        **GRAPH.resources("trajectory_rewards"),
    shell:
        'python -m tafs.evaluation.trajectory_rewards "$(dirname {input.run:q})" > {log:q} 2>&1'


# A metric behind a server scores the images later, so that the server has the GPUs to itself.
rule score_served:
    input:
        run=f"{ROOT}/runs/{{run}}/run.json",
        others=lambda wildcards: GRAPH.input_files("score_served", wildcards.run),
    output:
        f"{ROOT}/runs/{{run}}/served_scores.parquet",
    log:
        f"{ROOT}/logs/score_served/{{run}}.log",
    benchmark:
        f"{ROOT}/benchmarks/score_served/{{run}}.tsv"
    conda:
        "../../environment.yml"
    resources:
        **GRAPH.resources("score_served"),
    shell:
        'python -m tafs.evaluation.served "$(dirname {input.run:q})" > {log:q} 2>&1'


# The base models before their training, against the values that the paper prints for them.
rule check_base:
    input:
        GRAPH.input_files("check_base"),
    output:
        f"{ROOT}/base_check.json",
    log:
        f"{ROOT}/logs/check_base.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * (1 + attempt),
    params:
        root=subpath(output[0], parent=True),
        spec=GRAPH.plan.base_check.to_json() if GRAPH.plan.base_check else "",
    shell:
        "python -m tafs.report.base_check {params.root:q} {params.spec:q} > {log:q} 2>&1"
