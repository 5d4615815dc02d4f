"""PEFT's own AdaLoRA on a planted problem: the same student, batches, rates and schedule as our strategies have."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from autolora.adapters import find_sites
from autolora.config import RunConfig
from autolora.parts import adapter_settings, make_problem, optimization, seed_for
from autolora.plan import RankPlan
from autolora.run import cpu_threads
from autolora.training.module import schedule_factor
from autolora.training.problem import evaluate

T_INIT, T_FINAL, DELTA_T = 0.1, 0.5, 10  # as in conf/strategy/adalora.yaml


def orthogonality(model: nn.Module, weight: float) -> Tensor:
    """What PEFT adds to the loss of a Transformers model: ``weight`` times the mean of the Frobenius norms of
    ``P^T P - I`` and ``Q Q^T - I`` (Zhang et al., ICLR 2023, equation 4, with norms in place of their squares)."""
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
    return weight * torch.stack(norms).mean()


def train(cfg: RunConfig, components: float) -> tuple[RankPlan, float]:
    """Train and allocate.

    Args:
        cfg: what a run of ours would be given; its strategy and budget play no part.
        components: the total that AdaLoRA is told to keep.

    Returns:
        The plan found, and the excess error.
    """
    problem = make_problem(cfg)
    with cpu_threads(problem.threads):
        problem.build()
        sites = find_sites(problem.model, adapter_settings(cfg))
        steps = cfg.trainer.max_steps
        torch.manual_seed(seed_for(cfg.seed, "training"))
        config = AdaLoraConfig(
            init_r=cfg.max_rank, lora_alpha=cfg.max_rank, lora_dropout=0.0, target_modules=list(sites),
            total_step=steps, tinit=round(T_INIT * steps), tfinal=round(T_FINAL * steps), deltaT=DELTA_T,
            target_r=max(1, round(components / len(sites))),
        )  # fmt: skip
        model: Any = get_peft_model(problem.model, config)
        model.base_model.rankallocator.target_bgt = components  # its target_r is a whole number for each module
        optim = optimization(cfg)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=cfg.optim.adapter.lr, betas=cfg.optim.betas,
            eps=cfg.optim.eps, weight_decay=cfg.optim.adapter.weight_decay, fused=True,
        )  # fmt: skip
        schedule = LambdaLR(optimizer, lambda done: schedule_factor(done, steps, optim["warmup"], optim["schedule"]))
        model.train()
        step = 0
        while step < steps:
            for batch in problem.datamodule.train_dataloader():
                loss = problem.loss(model, batch) + orthogonality(model, config.orth_reg_weight)
                loss.backward()
                if cfg.trainer.gradient_clip_val:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.trainer.gradient_clip_val)
                optimizer.step()
                schedule.step()
                step += 1
                model.base_model.update_and_allocate(step)
                optimizer.zero_grad()
                if step == steps:
                    break
        found = {
            name.removeprefix("base_model.model.").removesuffix(".lora_E.default"): int((p != 0).sum())
            for name, p in model.named_parameters()
            if "lora_E" in name
        }
        scores = problem.scores({"dev": evaluate(problem, model, "dev")})
        return RankPlan(problem.true_plan.sites, found), float(scores.all["excess_error"] or 0.0)
