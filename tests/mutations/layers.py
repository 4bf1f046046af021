"""Planted bugs of the layers, of saving and loading, and of memories in other people's models.

Each is a file, a text in it, what stands there instead, and the tests of which one must fail.
"""

QUERY = "tests/layers/test_query.py"
NORMS = "tests/layers/test_norms.py"
USAGE = "tests/layers/test_usage.py"
HOSTED = "tests/layers/test_hosted.py"
MEMORY = "tests/layers/test_memory.py"
FILES = "tests/models/test_files.py"
CHECKPOINTS = "tests/models/test_checkpoints.py"
REPLACE = "tests/models/test_replace.py"
PADDING = "tests/models/test_padding.py"
HUGGING_FACE = "tests/models/test_hugging_face.py"

MUTATIONS: list[tuple[str, str, str, list[str]]] = [
    (
        "pkm_triton/batch_norm.py",
        "torch._C._current_graph_task_id() != -1",
        "False",
        [NORMS],
    ),
    (
        "pkm_triton/batch_norm.py",
        "(count > 1).to(torch.int64)",
        "(count > 0).to(torch.int64)",
        [NORMS],
    ),
    (
        "pkm_triton/batch_norm.py",
        "others[start : start + part.shape[0]]",
        "others[: part.shape[0]]",
        [NORMS],
    ),
    (
        "pkm_triton/batch_norm.py",
        "(input.shape[0] / (input.shape[0] - 1))",
        "1.0",
        [NORMS],
    ),
    (
        "pkm_triton/batch_norm.py",
        "if input.is_cuda or not self.elementwise_affine:",
        "if True:",
        [NORMS],
    ),
    (
        "pkm_triton/batch_norm.py",
        "normal = torch.batch_norm(wide, None, None, mean, variance, False, 0.0, self.eps, False)",
        "return super().forward(input)",
        [NORMS],
    ),
    (
        "pkm_triton/batch_norm.py",
        "centred = (wide - mean).masked_fill(padding, 0)",
        "centred = wide - mean",
        [NORMS, MEMORY],
    ),
    (
        "pkm_triton/batch_norm.py",
        "sums = _SumOverRanks.apply(sums, self.group)",
        "sums = _SumOverRanks.apply(sums, None)",
        ["tests/layers/test_synchronised_norm.py"],
    ),
    (
        "pkm_triton/batch_norm.py",
        "share = 1 / self.num_batches_tracked.clamp(min=1)",
        "share = 0.1",
        [NORMS],
    ),
    (
        "pkm_triton/usage.py",
        "dist.all_reduce(self.weight_sums, group=group)",
        "dist.all_reduce(self.weight_sums)",
        [USAGE],
    ),
    (
        "pkm_triton/usage.py",
        "if not (low >= 0 and math.isfinite(high)):",
        "if low < 0:",
        [USAGE],
    ),
    (
        "pkm_triton/usage.py",
        'device = "cpu" if self._device is None else self._device',
        "device = self._device",
        [USAGE],
    ),
    (
        "pkm_triton/training.py",
        "layer.usages.remove(usages[name])",
        "layer.usages.pop()",
        [USAGE],
    ),
    (
        "pkm_triton/memory.py",
        'return {**self.__dict__, "usages": [], "layer_mask": None}',
        "return self.__dict__",
        [USAGE],
    ),
    (
        "pkm_triton/memory.py",
        "if self.usages and not recomputing():",
        "if self.usages:",
        [NORMS],
    ),
    (
        "pkm_triton/memory.py",
        "            slots = torch.where(real, slots, rows.index_select(0, first)[0])\n",
        "",
        [MEMORY],
    ),
    (
        "pkm_triton/memory.py",
        "            self.layer_mask = None\n        weights",
        "        weights",
        [PADDING],
    ),
    (
        "pkm_triton/memory.py",
        "if loaded.isdisjoint((*self.query_net.parameters(), *self.query_net.buffers())):",
        "if True:",
        [HOSTED],
    ),
    (
        "pkm_triton/_module.py",
        "if value and not self._is_hf_initialized:",
        "if False:",
        [HOSTED],
    ),
    (
        "pkm_triton/_module.py",
        'if name in ("values", "keys"):',
        "if False:",
        [HOSTED],
    ),
    (
        "pkm_triton/_layer_checks.py",
        "if x.device != weight.device:",
        "if False:",
        [MEMORY],
    ),
    (
        "pkm_triton/_files.py",
        "weights_only=True",
        "weights_only=False",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "            if fcntl is not None:  # while it is locked\n"
        "                os.replace(temporary, path)\n",
        "            path.write_bytes(temporary.read_bytes())\n            temporary.unlink()\n",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "same = checksum(part) == expected",
        "same = True",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "data = part.detach().cpu().resolve_conj().resolve_neg().contiguous()",
        "data = part.detach()[:1].contiguous(); size = data.numel() * data.element_size()",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "                os.chmod(temporary, mode)\n",
        "                pass\n",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "path = Path(os.path.realpath(path))",
        "path = Path(path)",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "pass\n",
        [FILES],
    ),
    (
        "pkm_triton/_files.py",
        "    _remove_leftovers(path)\n    handle",
        "    handle",
        [FILES],
    ),
    (
        "pkm_triton/checkpoints.py",
        "if len(each) > 1 and not any(set(each) <= group for group in groups):",
        "if False:",
        [CHECKPOINTS],
    ),
    (
        "pkm_triton/checkpoints.py",
        "for name in names[1:]:",
        "for name in []:",
        [CHECKPOINTS],
    ),
    (
        "pkm_triton/checkpoints.py",
        "memory.to_empty(device=device).train(replaced.training)",
        "memory.to_empty(device=device)",
        [CHECKPOINTS],
    ),
    (
        "pkm_triton/checkpoints.py",
        "tensor.data = tensor.data.to(theirs.dtype)",
        "pass",
        [CHECKPOINTS],
    ),
    (
        "pkm_triton/checkpoints.py",
        "ours.shape != theirs.shape or ours.dtype != theirs.dtype",
        "ours.shape != theirs.shape",
        [CHECKPOINTS],
    ),
    (
        "pkm_triton/_ffn.py",
        "if unpacked or len(call.args) != 1 or call.keywords:",
        "if len(call.args) != 1 or call.keywords:",
        [REPLACE],
    ),
    (
        "pkm_triton/_ffn.py",
        "if (dim, value_dim) != (width, out.shape[-1]):",
        "if dim != width:",
        [REPLACE],
    ),
    (
        "pkm_triton/_ffn.py",
        "if all(p.dtype in FLOATING_DTYPES for p in own) and own:",
        "if own:",
        [REPLACE],
    ),
    (
        "pkm_triton/_padding.py",
        "seen = mask[:, -length:] != 0",
        "seen = mask[:, :length] != 0",
        [PADDING],
    ),
    (
        "pkm_triton/_padding.py",
        "seen.diagonal(dim1=-2, dim2=-1)",
        "seen[:, 0]",
        [PADDING],
    ),
    (
        "pkm_triton/_padding.py",
        "mask = mask.transpose(0, 1)",
        "pass",
        [PADDING],
    ),
    (
        "pkm_triton/_padding.py",
        "seen = seen > torch.finfo(seen.dtype).min / 2",
        "seen = seen != 0",
        [PADDING],
    ),
    (
        "pkm_triton/hf/memories.py",
        "tensor.data = tensor.data.to(getattr(torch, other))",
        "pass",
        [HUGGING_FACE],
    ),
    (
        "pkm_triton/hf/memories.py",
        "sharing.share_values(first)  # they",
        "pass  # they",
        [HUGGING_FACE],
    ),
    (
        "pkm_triton/hf/loading.py",
        "            self.remove_quantization_config(model)\n",
        "            pass\n",
        [HUGGING_FACE],
    ),
    (
        "pkm_triton/hf/loading.py",
        "        write(model, self.memories)\n",
        "",
        [HUGGING_FACE],
    ),
    (
        "pkm_triton/hf/config.py",
        "GUARD: False}",
        "}",
        [HUGGING_FACE],
    ),
    (
        "pkm_triton/hf/loading.py",
        '_check_files(model, options.get("checkpoint_files"))',
        "pass",
        [HUGGING_FACE],
    ),
    (
        "pkm_triton/hf/memories.py",
        'vars(made)["_initialise"] = functools.partial(_refuse, place, made)',
        "pass",
        [HUGGING_FACE],
    ),
    ("pkm_triton/_module.py", "self._share_again(loaded)\n", "pass\n", [HOSTED]),
    ("pkm_triton/_module.py", "next(held, tables[0])", "tables[0]", [HOSTED]),
    ("pkm_triton/query.py", 'if self.norm_name == "batch":', "if False:", [QUERY]),
    (
        "pkm_triton/checkpoints.py",
        "if attribute not in model.get_submodule(parent)._modules:",
        "if False:",
        [CHECKPOINTS],
    ),
]
