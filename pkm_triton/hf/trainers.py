"""Training memories with transformers' `Trainer` and with accelerate.

Both clip with torch's own function, which has no norm of sparse gradients, and wrap models in
`DistributedDataParallel`, which averages none. A loop of one's own with accelerate:

    accelerator = clip_all_gradients(Accelerator())
    model, optimizer = accelerator.prepare(ignore_sparse_values(model), optimizer)
    if isinstance(model, DistributedDataParallel):
        average_sparse_values(model)
"""

from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from pkm_triton._optimizer_options import check_number
from pkm_triton.clipping import clip_grad_norm_
from pkm_triton.distributed import average_sparse_values, ignore_sparse_values
from pkm_triton.memory import _KeyValueMemory
from pkm_triton.optim import SparseAdam
from pkm_triton.training import table_parameters

_OWN_CLIPPING = (
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
)
# The Trainer's default is one or the other; `optim.SparseAdam` is both where gradients are dense.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def clip_all_gradients(accelerator: Accelerator) -> Accelerator:
    """Let `accelerator.clip_grad_norm_` take sparse and factored gradients too.

    Where accelerate leaves clipping to something else (FSDP, DeepSpeed) it stays as it is.

    Args:
        accelerator: changed in place.

    Returns:
        The same accelerator.

    Raises:
        TypeError: if it is no `Accelerator`.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an Accelerator, not {type(accelerator).__name__}")
    if accelerator.distributed_type in _OWN_CLIPPING:
        return accelerator

    def clip(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        self.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm, norm_type)

    accelerator.clip_grad_norm_ = MethodType(clip, accelerator)
    return accelerator


class MemoryTrainerMixin:
    """What a `Trainer` needs for memories of every `sparse_grad`; to stand before it as a base.

    `class MyTrainer(MemoryTrainerMixin, SFTTrainer): ...`; for `Trainer` itself there is
    `MemoryTrainer`. It trains with `optim.SparseAdam`, which on dense gradients is AdamW, at two
    learning rates, clips gradients of all kinds together, and under `DistributedDataParallel`
    averages sparse ones as what they are. Another optimiser than AdamW is refused where `args`
    choose it, and taken as it is in `optimizers`. Resuming from a checkpoint continues to the bit.

    Args:
        *args: those of the `Trainer`.
        value_learning_rate: of the memories' values; None: 4 times `args.learning_rate`, as in the
            paper (4.3). A schedule scales both alike.
        value_weight_decay: of the memories' values; None: `args.weight_decay`.
        **kwargs: those of the `Trainer`.

    Raises:
        TypeError: if an option is no number.
        ValueError: if an option is negative or not finite, or `args.optim`, `args.optim_args` or
            `optimizer_cls_and_kwargs` choose another optimiser.
    """

    def __init__(
        self,
        *args: Any,
        value_learning_rate: float | None = None,
        value_weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        if value_learning_rate is not None:
            check_number("value_learning_rate", value_learning_rate)
        if value_weight_decay is not None:
            check_number("value_weight_decay", value_weight_decay)
        self.value_learning_rate = value_learning_rate
        self.value_weight_decay = value_weight_decay
        self._averaging: Any = None
        super().__init__(*args, **kwargs)
        self._check_optimizer()

    def _check_optimizer(self: Any) -> None:
        if self.optimizer is not None:
            return
        instead = "MemoryTrainer trains with pkm.optim.SparseAdam: give another as `optimizers`"
        optim = getattr(self.args.optim, "value", self.args.optim)
        if optim not in _ADAMW:
            raise ValueError(f"optim is {optim!r}, but must be {' or '.join(_ADAMW)}: {instead}")
        if self.args.optim_args:
            raise ValueError(f"optim_args is {self.args.optim_args!r}, but must be None: {instead}")
        if self.optimizer_cls_and_kwargs is not None:
            kind = self.optimizer_cls_and_kwargs[0]
            raise ValueError(f"optimizer_cls_and_kwargs is of {kind}, but must be None: {instead}")

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`optim.SparseAdam` on the values, on what decays and on what does not."""
        model = model if model is not None else self.model
        assert model is not None
        args = self.args
        if args.world_size > 1:
            ignore_sparse_values(model)  # the model has not been wrapped yet
        if self.optimizer is not None:
            return self.optimizer
        memories = [m for m in model.modules() if isinstance(m, _KeyValueMemory)]
        values = {id(table) for memory in memories for table in table_parameters(memory)}
        decaying = set(self.get_decay_parameter_names(model))
        rates = args.learning_rate, self.value_learning_rate
        value_lr = 4 * rates[0] if rates[1] is None else rates[1]
        value_decay = self.value_weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": args.weight_decay},
            {"params": [], "weight_decay": 0.0},
            {
                "params": [],
                "lr": value_lr,
                "weight_decay": args.weight_decay if value_decay is None else value_decay,
            },
        ]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                group = 2 if id(parameter) in values else int(name not in decaying)
                groups[group]["params"].append(parameter)
        self.optimizer = SparseAdam(
            [group for group in groups if group["params"]],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        return self.optimizer

    def create_accelerator_and_postprocess(self: Any) -> None:
        """As the `Trainer`; its accelerator clips gradients of all kinds."""
        super().create_accelerator_and_postprocess()  # pyright: ignore[reportAttributeAccessIssue]
        clip_all_gradients(self.accelerator)

    def training_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As the `Trainer`; the first time averaging is set up."""
        if isinstance(model, DistributedDataParallel) and self._averaging is not model:
            self._averaging = average_sparse_values(model)
        return super().training_step(model, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class MemoryTrainer(MemoryTrainerMixin, Trainer):
    """`transformers.Trainer` for memories of every `sparse_grad`; see `MemoryTrainerMixin`."""
