"""Learning what to cache: training of routers and predictors on a frozen model.

In reading order: `student` (the model with its sites mixed by `tcc.passes.superpose`), `weights` and `predictors` (what
is learned, and the budget), `objective` (the loss of one P-step), `pairs` and `trajectories` (where P-steps come from),
`loop`, `world` (several processes) and `images`. `tcc train` puts them together.
"""
