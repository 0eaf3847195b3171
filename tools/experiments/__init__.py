"""The experiments of the TMPDiff paper on any bundle, one command each.

    python -m tools.experiments.single_steps   BUNDLE --prompts FILE --out PREFIX
    python -m tools.experiments.rank_deviation BUNDLE --prompts FILE --out PREFIX
    python -m tools.experiments.prediction     BUNDLE --prompts FILE --out PREFIX
    python -m tools.experiments.quality        BUNDLE --prompts FILE --out PREFIX

Each writes PREFIX.json with the raw figures of every sample and PREFIX.png, and prints its goals. What was measured is
kept in a journal beside the bundle that all four share, one for every set of precisions, so that an interrupted command
goes on where it stopped and none measures what another has. Where the bundle's packages are compiled for several pictures
at once, so many samples are measured together. `--redraw FILE.json` analyses and draws again without a bundle.

`python -m tools.experiments.proof` runs `prediction` and `quality` of several bundles and precisions at once, a process
each, and `summary` puts their result files beside each other. `speed_quality` draws files of `quality` over the speed-up,
by a table of ratios of steps.

`python -m tools.experiments.prompts --kinds plain,composed,unusual --out FILE` draws prompts in any number. `agreement`
reads result files, `transfer` measures a pair of bundles; `steps` makes a bundle of another number of steps, and
`fetch_lpips` fetches what `--lpips` takes. Each says how it is called.
"""
