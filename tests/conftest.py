"""Settings for all tests."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the models are tiny: waiting for a second thread costs more than it computes
