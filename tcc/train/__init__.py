"""Learning what to cache, on a frozen model: any that captures, whatever its signature.

`tcc train` does it for models of `tcc.models`. For others, `Calls` says what a call is made of, and the rest is the
same. A router for diffusers' PixArt, on whole runs from noise, and the plan that it becomes:

    import diffusers, tcc, tcc.train, torch
    from pathlib import Path
    from tcc.samplers import DDIM

    model = diffusers.PixArtTransformer2DModel.from_pretrained(...).eval()

    def draw(generator):                       # unit noise, and what the model is told for a whole run
        prompts = torch.randn(2, 120, 4096, generator=generator)  # real embeddings, in earnest
        return torch.randn(2, 4, 32, 32, generator=generator), prompts

    def call(x, t, prompts):                   # one call; guidance would double all three, and halve `prediction`
        return (x, prompts, t), {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    calls = tcc.train.Calls(draw, call)
    args, kwargs = calls.example()
    info = tcc.inspect(model, *args, **kwargs)
    sites = [name for name, site in info.sites.items() if site.kind == "out"]
    choices = {step: sites for step in range(1, 20, 2)}        # the P-steps, and what they may reuse
    objective = tcc.train.Objective(tcc.train.Student(info, sites), tcc.train.Budget(price=1e-4))
    recipe = tcc.train.Trajectories(objective, calls, choices, num_steps=20, sampler=DDIM(clip=False))
    router = tcc.train.RouterWeights(20, sites, choices)
    settings = tcc.train.Settings(iterations=200, lr=0.2)
    tcc.train.train(router, recipe, settings, state=Path("state.safetensors"))
    plan = tcc.plans.l2c(info, num_steps=20, router=router.learned(), theta=0.5)

Tokens instead of branches: `TokenWeights(TablePredictor(Sizes.of(info, 20), mean=0.5), info, choices)`, a `Budget()`,
and `tcc.plans.tokencache(info, num_steps=20, importance=weights.learned())`. Latents instead of noise:
`open_latents(folder).take` in `draw`, and `Pairs` for `Trajectories`.

In reading order: `student` (the model with its sites mixed by `tcc.passes.superpose`), `weights` and `predictors` (what
is learned, and the budget), `objective` (the loss of one P-step), `calls` (how a model is called), `pairs` and
`trajectories` (where P-steps come from), `loop`, `world` (several processes) and `images`.
"""

from tcc.train.calls import Calls, images_with_labels, noise_with_labels
from tcc.train.images import FolderImages, FolderLatents, Images, MemoryImages, open_images, open_latents
from tcc.train.loop import Report, Settings, train
from tcc.train.objective import Objective, Recipe, StepLoss
from tcc.train.pairs import Pairs
from tcc.train.predictors import NetworkPredictor, Predictor, Sizes, StreamPredictor, TablePredictor, load_predictor
from tcc.train.student import Student, Values
from tcc.train.trajectories import Trajectories, collect_streams
from tcc.train.weights import Budget, Choices, RouterWeights, TokenWeights, Weights, choices_of, choices_of_pairs
from tcc.train.world import World, join_world

__all__ = [
    "Budget",
    "Calls",
    "Choices",
    "FolderImages",
    "FolderLatents",
    "Images",
    "MemoryImages",
    "NetworkPredictor",
    "Objective",
    "Pairs",
    "Predictor",
    "Recipe",
    "Report",
    "RouterWeights",
    "Settings",
    "Sizes",
    "StepLoss",
    "StreamPredictor",
    "Student",
    "TablePredictor",
    "TokenWeights",
    "Trajectories",
    "Values",
    "Weights",
    "World",
    "choices_of",
    "choices_of_pairs",
    "collect_streams",
    "images_with_labels",
    "join_world",
    "load_predictor",
    "noise_with_labels",
    "open_images",
    "open_latents",
    "train",
]
