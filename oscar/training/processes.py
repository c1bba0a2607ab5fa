"""The processes of a run: one, several on a machine or on many, on GPUs or, for tests, on CPUs."""

from __future__ import annotations

import logging
import os
import uuid
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from vector_quantize_pytorch import VectorQuantize

from oscar.config import ConfigError, TrainConfig
from oscar.training.stages.base import Stage

log = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=2)  # while the first process counts entropy tables, the others wait


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run; make it before the stage, whose codebooks ask whether there are several processes.

    Raises:
        ConfigError: if Accelerate started fewer processes than it was asked for.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not several and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; allowed: "
            "accelerate launch --config_file configs/accelerate/cpu.yaml --num_processes N"
        )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # of DeepSpeed's launcher, over our configuration
    stage = config.stage
    all_rates = stage.name == "bottleneck" and stage.rates_per_step is None and not stage.rate_weights
    # Without all rates a step leaves networks unused. Buffers are constant or, as the codebooks' averages, all-reduced
    # where they are made: no need to send the first process's around before every pass.
    replicas = DistributedDataParallelKwargs(find_unused_parameters=not all_rates, broadcast_buffers=False)
    accelerator = Accelerator(
        # Accelerate itself takes several processes without a GPU for unrelated ones
        cpu=several and not torch.cuda.is_available(),
        gradient_accumulation_steps=config.trainer.accumulation,
        mixed_precision=config.trainer.mixed_precision,
        log_with=[name for name in ("tensorboard", "wandb") if getattr(config.logger, name)] or None,
        project_dir=config.output,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[replicas, InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    check_total_batch(config, accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.data.batch_size
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and accelerator.is_main_process:
        log.warning(
            "trainer.mixed_precision is 'fp16', which takes a GPU: on this CPU all is computed in float32; "
            "allowed on a CPU: no, bf16"
        )
    return accelerator


def check_total_batch(config: TrainConfig, processes: int) -> None:
    """Refuse a number of crops per optimiser step that is not the configured one.

    Raises:
        ConfigError: naming the settings that fit.
    """
    data, passes = config.data, processes * config.trainer.accumulation
    made, wanted = data.batch_size * passes, data.total_batch_size
    if wanted not in (None, made):
        fitting = f"data.batch_size={wanted // passes}, or " if wanted % passes == 0 else ""
        raise ConfigError(
            f"data.total_batch_size is {wanted}, but processes {processes} x data.batch_size "
            f"{data.batch_size} x trainer.accumulation {config.trainer.accumulation} are {made}; "
            f"allowed: {fitting}data.total_batch_size=null"
        )


def check_processes(config: TrainConfig, stage: Stage, accelerator: Accelerator) -> None:
    """Refuse what would train something else than one process does.

    Raises:
        ConfigError: for a setting that the way of sharing does not support.
        RuntimeError: if the stage's codebooks do not know of the other processes.
    """
    kind, precision = accelerator.distributed_type, config.trainer.mixed_precision
    if kind == DistributedType.DEEPSPEED and precision != "no":
        raise ConfigError(
            f"trainer.mixed_precision is {precision!r}, but DeepSpeed would keep the codebooks in "
            "it too; allowed with DeepSpeed: no"
        )
    if kind == DistributedType.DEEPSPEED and config.stage.independent_rates and config.optimiser.grad_clip is not None:
        raise ConfigError(
            "stage.independent_rates is true, but DeepSpeed clips all gradients together; allowed with "
            "DeepSpeed: false, or optimiser.grad_clip=null"
        )
    if kind == DistributedType.DEEPSPEED and config.trainer.non_finite == "skip":
        raise ConfigError(
            "trainer.non_finite is 'skip', but DeepSpeed makes its step before the gradients can be "
            "looked at; allowed with DeepSpeed: stop"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("fsdp_version is 1; allowed: 2, as in configs/accelerate/fsdp.yaml")
    if accelerator.num_processes > 1:
        for name, module in stage.named_modules():
            if isinstance(module, VectorQuantize) and not module._codebook.use_ddp:
                raise RuntimeError(
                    f"{name}: was built before the processes were joined, so that each would keep a "
                    "codebook of its own; make the accelerator first"
                )


def critic_accelerator(accelerator: Accelerator) -> Accelerator:
    """The accelerator for a second network: the same, but DeepSpeed wants one for each."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator
    steps = accelerator.gradient_accumulation_steps
    return Accelerator(gradient_accumulation_steps=steps, step_scheduler_with_optimizer=False)


def start_trackers(config: TrainConfig, accelerator: Accelerator, step: int) -> None:
    """Open TensorBoard and Weights & Biases so that a resumed run goes on in the same curves from this step."""
    options: dict[str, dict] = {"tensorboard": {"purge_step": step + 1 if step else None}}
    if config.logger.wandb and accelerator.is_main_process:
        path = Path(config.output) / "wandb-id"
        if not path.exists() or step == 0:
            path.write_text(uuid.uuid4().hex[:8])
        options["wandb"] = {"id": path.read_text(), "resume": "allow", "dir": config.output}
    accelerator.init_trackers(config.logger.project, init_kwargs=options)
