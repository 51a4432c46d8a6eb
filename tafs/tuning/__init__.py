"""The hyperparameter search: `snakemake tune`, or `python -m tafs.tuning [--scale shapes]`.

Every method gets as many trials, the same seeds, which no table uses, and the scale's iterations;
config.yaml's `tuning` says what is searched. A trial trains once for each seed. Its gain with a
seed is that in mean total reward over the base model, at the tables' few steps, on training prompts
with start noise from the seed. Held-out prompts are not used. Of a method's trials

- the first has the method's present values, the next DESIGN - 1 are spread over the space, and the
  others are chosen by a tree-structured Parzen estimator (Optuna);
- the objective is the mean gain minus its standard error;
- one whose mean gain so far is below the median of the trials before it stops early ("pruned").

Files of results/SCALE/tuning/:

    METHOD.csv            a row per trial; written at the end, since it counts as a finished search
    METHOD.best.yaml      what to enter in config.yaml
    METHOD.optuna.jsonl   the study; a search that was stopped continues with the same trials
    RUN/                  the run folder of a trial and a seed
"""
