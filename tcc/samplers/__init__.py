"""Samplers: solvers that turn noise into images by evaluations of a model, which are the steps of a plan."""

from tcc.samplers.ddim import DDIM, DDPM, ddim_step, ddpm_step, predict_x0
from tcc.samplers.diffusion import Diffusion, Step
from tcc.samplers.dpm import DPMSolver2
from tcc.samplers.flow import FlowEuler
from tcc.samplers.guided import SAMPLERS, guide, named, sample, timestep_dtype
from tcc.samplers.sampler import Evaluation, Sampler, Solving, denoise
from tcc.samplers.schedulers import Scheduled, dpm_solver_2m, dpm_solver_2s

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "DPMSolver2",
    "Diffusion",
    "Evaluation",
    "FlowEuler",
    "Sampler",
    "Scheduled",
    "Solving",
    "Step",
    "ddim_step",
    "ddpm_step",
    "denoise",
    "dpm_solver_2m",
    "dpm_solver_2s",
    "guide",
    "named",
    "predict_x0",
    "sample",
    "timestep_dtype",
]
