"""If these failed, an attack would follow another learning-rate curve than its name says."""

import pytest
import torch

from patcher_pl.optim import lr_factor


@pytest.mark.parametrize("num_warmup_steps", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_curve_is_the_one_of_that_name_in_transformers(schedule, num_warmup_steps):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    curve = get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=10)
    for step in range(10):
        ours = lr_factor(schedule, step=step, num_steps=10, num_warmup_steps=num_warmup_steps)
        assert ours == curve.get_last_lr()[0]
        optimizer.step()
        curve.step()
