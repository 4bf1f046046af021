"""Planted bugs of the optimisers, the gradients they take, and what averages and clips those.

Each is a file, a text in it, what stands there instead, and the tests of which one must fail.
"""

STEP = "tests/optim/test_sparse_adam.py"
ROUNDING = "tests/optim/test_rounding.py"
STATE = "tests/optim/test_state.py"
INPUT = "tests/optim/test_optimiser_input.py"
FACTORED = "tests/optim/test_factored.py"
TRAINING = "tests/optim/test_training.py"
CLIP = "tests/optim/test_clip_grad_norm.py"
GATHER = "tests/ops/test_gather_values.py"
GRID = "tests/kernels/test_grid.py"
READS = "tests/kernels/test_scatter_adam.py"
KERNEL = "tests/kernels/test_sparse_adam_kernel.py"
DEVICES = "tests/package/test_devices.py"
GROUPS = "tests/layers/test_param_groups.py"
PARALLEL = "tests/distributed/test_data_parallel.py"
TRAINER = "tests/trainers/test_hugging_face_trainer.py"
LIGHTNING = "tests/trainers/test_lightning.py"
MEMORY = "tests/ops/test_memory_bound.py"

MUTATIONS: list[tuple[str, str, str, list[str]]] = [
    # A sparse gradient and its rows.
    (
        "pkm_triton/gradients.py",
        "indices[0, 1:] <= indices[0, :-1]",
        "indices[0, 1:] < indices[0, :-1]",
        [STEP],
    ),
    ("pkm_triton/gradients.py", "rows = rows * size + index", "rows = rows + size * index", [STEP]),
    ("pkm_triton/gradients.py", "low < 0 or high >= ", "low < 0 or high > ", [INPUT]),
    ("pkm_triton/gradients.py", "stored._coalesced_(True)", "stored._coalesced_(False)", [GATHER]),
    ("pkm_triton/gradients.py", ") == known:", ") != 0:", [GATHER]),
    # A factored gradient.
    (
        "pkm_triton/reads.py",
        "return x.detach().clone(",
        "return x.detach().contiguous(",
        [FACTORED],
    ),
    (
        "pkm_triton/factored.py",
        "return FactoredGradient(grad, list(grad.reads))",
        "return FactoredGradient(grad, grad.reads)",
        [FACTORED],
    ),
    (
        "pkm_triton/factored.py",
        "return FactoredGradient(grad, grad.reads)",
        "return FactoredGradient(grad, list(grad.reads))",
        [FACTORED],
    ),
    ("pkm_triton/factored.py", "else [part.scaled(alpha)", "else [part.scaled(1)", [FACTORED]),
    ("pkm_triton/factored.py", "return _mul(grad, 1 / ", "return _mul(grad, 1 * ", [FACTORED]),
    (
        "pkm_triton/reads.py",
        "torch.zeros_like(p.weights[:, -1:])",
        "p.weights[:, -1:]",
        [TRAINING],
    ),
    ("pkm_triton/factored.py", "arg[index : index + 1]", "arg[:1]", [FACTORED]),
    ("pkm_triton/factored.py", "    grad.reads[:] = made.reads", "    pass", [FACTORED]),
    (
        "pkm_triton/factored.py",
        "unscale([grad_output], found_inf, inverse_scale)",
        "unscale([grad_output], found_inf, torch.ones_like(inverse_scale))",
        [TRAINING],
    ),
    (
        "pkm_triton/reads.py",
        "torch.linalg.vector_norm(torch.stack(norms), norm_type)",
        "torch.stack(norms).sum()",
        [FACTORED],
    ),
    (
        "pkm_triton/factored.py",
        "torch.promote_types(self.dtype, torch.float32)",
        "self.dtype",
        [FACTORED],
    ),
    # Clipping.
    (
        "pkm_triton/clipping.py",
        "for grad in factored]\n    norms",
        "for grad in factored[1:]]\n    norms",
        [CLIP],
    ),
    (
        "pkm_triton/clipping.py",
        "        grad.mul_(scale)\n    return",
        "        pass\n    return",
        [CLIP],
    ),
    ("pkm_triton/clipping.py", "grad if grad.is_coalesced() else _coalesced(grad)", "grad", [CLIP]),
    ("pkm_triton/clipping.py", "norm_type, error_if_nonfinite)", "norm_type, False)", [CLIP]),
    # What optimisers of rows have in common.
    (
        "pkm_triton/_row_optimizer.py",
        "f\"{group['seed']} {index}{_shard_of(param)}\"",
        "f\"{group['seed']}\"",
        [ROUNDING],
    ),
    (
        "pkm_triton/_row_optimizer.py",
        "                index += 1",
        "                index = 0",
        [ROUNDING],
    ),
    (
        "pkm_triton/_row_optimizer.py",
        "            del self.param_groups[count:]\n",
        "",
        [INPUT],
    ),
    (
        "pkm_triton/_row_optimizer.py",
        'number = state["step"] + 1',
        'state["step"] += 1\n        number = state["step"]',
        [INPUT],
    ),
    (
        "pkm_triton/_row_optimizer.py",
        "todo.append((param, group, index, self._functions(param)))",
        "self._step_one(param, group, index, self._functions(param))",
        [INPUT],
    ),
    ("pkm_triton/_row_optimizer.py", "count, dtype=torch.float32,", "count,", [STATE]),
    (
        "pkm_triton/_row_states.py",
        "torch.promote_types(param.dtype, torch.float32)",
        "param.dtype",
        [STATE],
    ),
    ("pkm_triton/_row_optimizer.py", "(loading.put, prepend=True)", "(loading.put)", [STATE]),
    (
        "pkm_triton/_row_optimizer.py",
        "            if dense is not mine:\n                mine.copy_(dense)\n",
        "",
        [STEP],
    ),
    # The rule and its options.
    ("pkm_triton/optim.py", 'check_number("weight_decay"', 'float; ("weight_decay"', [INPUT]),
    ("pkm_triton/_optimizer_options.py", "else number >= 0", "else number > 0", [STEP]),
    ("pkm_triton/_optimizer_options.py", "and number < below", "and number <= below", [INPUT]),
    ("reference/sparse_adam.py", "1 - options.beta2**number", "1 - options.beta1**number", [STEP]),
    ("reference/sparse_adam.py", "value.mul_(decay)", "pass", [STEP]),
    ("reference/row_update.py", "increment_version(written)", "increment_version([])", [STEP]),
    ("reference/row_update.py", "slice) and num_rows == padded and", "slice) and", [STEP]),
    ("reference/row_update.py", "self.count = min(piece, ", "self.count = max(piece, ", [MEMORY]),
    ("reference/sparse_adam.py", "table.view(-1, 1) for table", "table for table", [MEMORY]),
    ("reference/rounding.py", 'f"{seed} {step}"', 'f"{seed}"', [ROUNDING]),
    ("reference/rounding.py", 'f"{seed} {step}"', 'f"{seed % 2**32} {step}"', [ROUNDING]),
    ("reference/rounding.py", "clamp_(13, 23)", "clamp_(13, 13)", [ROUNDING]),
    ("reference/rounding.py", "torch.where(x.isfinite(), rounded, x)", "rounded", [ROUNDING]),
    # The kernels.
    (
        "kernels/rounding.py",
        "tl.abs(rounded) > 65504.0, infinity",
        "tl.abs(rounded) > 65504.0, x * 0 + 65504.0",
        [ROUNDING],
    ),
    ("kernels/rounding.py", "tl.philox(seed, low,", "tl.philox(0, low,", [KERNEL]),
    ("kernels/in_place.py", "if x is not None and not x.is_inference()", "if x is None", [STEP]),
    ("kernels/sparse_adam.py", "tl.where(index < num_rows, index, -1)", "index * 0", [ROUNDING]),
    (
        "kernels/grid.py",
        "tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)",
        "tl.program_id(1)",
        [GRID],
    ),
    (
        "kernels/grid.py",
        "return first, triton.cdiv(second, folds), folds",
        "return first, second // folds, folds",
        [GRID],
    ),
    ("kernels/scatter_adam.py", "mask=column_block == 0)", "mask=column_block == 1)", [READS]),
    # Where kernels run, groups, and several ranks.
    (
        "pkm_triton/_devices.py",
        "return torch.cuda.device(device) if",
        "return torch.cuda.device(0) if",
        [DEVICES],
    ),
    (
        "pkm_triton/_backend.py",
        "return OnDevice(importlib",
        "return (lambda m, _: m)(importlib",
        [DEVICES],
    ),
    (
        "pkm_triton/training.py",
        'group["weight_decay"] = value',
        'options[0]["weight_decay"] = value',
        [GROUPS],
    ),
    ("pkm_triton/distributed/gathering.py", "1 / len(counts)", "1.0", [PARALLEL]),
    ("pkm_triton/distributed/gathering.py", "/ len(sizes)", "/ 1", [PARALLEL]),
    ("pkm_triton/distributed/gathering.py", "part[:count] for part", "part for part", [PARALLEL]),
    (
        "pkm_triton/distributed/data_parallel.py",
        "distributed.broadcast(table.detach(), source, group=group)",
        "pass",
        [PARALLEL],
    ),
    (
        "pkm_triton/distributed/data_parallel.py",
        "if bucket.index() == 0:",
        "if bucket.index() == 1:",
        [PARALLEL],
    ),
    # Shards, and trainers.
    ("pkm_triton/clipping.py", "norms.append(total.full_tensor())", "pass", [PARALLEL]),
    ("pkm_triton/clipping.py", "dense.extend(map(local, sharded))", "pass", [PARALLEL]),
    (
        "pkm_triton/_row_optimizer.py",
        "grad, mine = local(param.grad), ",
        "grad, mine = param.grad, ",
        [PARALLEL],
    ),
    ("pkm_triton/hf/trainers.py", "4 * rates[0]", "rates[0]", [TRAINER]),
    ("pkm_triton/hf/trainers.py", "int(name not in decaying)", "0", [TRAINER]),
    (
        "pkm_triton/hf/trainers.py",
        "clip_grad_norm_(parameters, max_norm, norm_type)",
        "clip_grad_norm_(parameters, 1e9, norm_type)",
        [TRAINER],
    ),
    (
        "pkm_triton/hf/trainers.py",
        "self._averaging = average_sparse_values(model)",
        "self._averaging = model",
        [TRAINER],
    ),
    ("pkm_triton/lightning.py", "elif value:", "elif not value:", [LIGHTNING]),
    ("pkm_triton/lightning.py", 'if algorithm != "norm":', "if False:", [LIGHTNING]),
]
