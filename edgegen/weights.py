"""Reading, checking, fitting and writing weights, without ever running code that a file carries.

A weights file is .safetensors, or a torch file (.pth, .pt, .th, .ckpt, .bin) opened with `weights_only=True`. Reading
is separate from fitting: `read_state` knows nothing of the network, `load_into` compares names and shapes with it and
copies everything or nothing.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgegen import files, registry
from edgegen.errors import ModelError

_log = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".ckpt", ".bin")
# Where training scripts put the weights; averaged weights first, since those are what their authors evaluate.
_WRAPPERS = ("params_ema", "state_dict_ema", "model_ema", "ema", "g_ema", "state_dict", "model_state_dict", "params",
             "model", "generator", "net", "genA2B", "g")  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile
_SHOWN = 8


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a weights file into names and CPU tensors, unwrapped from `state_dict`, `params_ema`, `module.` and such.

    Raises:
        ModelError: no such file, empty, truncated, carries code, holds no tensors, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"weights {path}: no such file")
    if path.stat().st_size == 0:
        raise ModelError(f"weights {path}: the file is empty")
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ModelError(f"weights {path}: unknown file type {path.suffix!r}; known are {known}")
    state = _strip_prefixes(_unwrap(content, path))
    _check_finite(state, path)
    return state


def load_into(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy `state` into `module`, cast to the module's own dtypes; all of it or nothing.

    Tied tensors may be stored once. `num_batches_tracked` may be missing (torch before 0.4.1 had none).

    Args:
        module: changed in place; `requires_grad` stays as it is.
        source: where the state comes from, for messages.
    Raises:
        ModelError: missing or unexpected names, a wrong shape, or integers where the module has floats.
    """
    expected = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    # A module may leave out of its state what still has its first value; the file may hold another one.
    expected |= {name: tensor.detach() for name, tensor in module.named_parameters() if name in state}
    fitted = _fit_names(dict(state), expected)
    _fill_aliases(fitted, expected)
    _check_names(fitted, expected, source)
    for name, tensor in fitted.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise ModelError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the network expects {tuple(want.shape)}; "
                "these weights belong to another configuration"
            )
        if want.is_floating_point() and not tensor.is_floating_point():
            raise ModelError(f"{source}: {name} is {tensor.dtype}, the network expects {want.dtype}; use float weights")
    for name, want in expected.items():  # the checks are done: from here on nothing is refused
        fitted.setdefault(name, want)
    module.load_state_dict(fitted, strict=False)


def state_hash(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of the module's state, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(module).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def save_state(module: nn.Module, path: Path) -> None:
    """Write the module's state as safetensors, the same bytes for the same state, whole or not at all.

    A tensor that several names share is written once, under the first name; `load_into` ties it again.
    """
    from safetensors.torch import save_file

    written: dict[tuple[Any, ...], str] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(_tensors(module).items()):
        if tensor.numel() and written.setdefault(_place(tensor), name) != name:
            continue
        state[name] = tensor.detach().to("cpu").contiguous().clone()
    with files.whole(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})  # one key: their order would not be deterministic


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"weights {path}: damaged or not a safetensors file ({_line(error)})") from error


def _read_torch(path: Path) -> Any:
    """torch.load with weights_only: refuses what is not tensors and plain containers, and runs nothing."""
    try:
        with warnings.catch_warnings():  # files saved with a newer pickle protocol load well, or fail below
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_pickle(path):
            raise ModelError(
                f"weights {path}: the file holds Python objects or code beside tensors; refused, and not run; "
                "save `model.state_dict()` alone, best as .safetensors"
            ) from error
        raise ModelError(f"weights {path}: damaged or not a torch weights file") from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"weights {path}: damaged, cut short or not a torch weights file ({_line(error)})") from error


def _is_pickle(path: Path) -> bool:
    """Whether the file is a torch archive or begins like a pickle of protocol 2 or later."""
    with path.open("rb") as handle:
        return handle.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The mapping of names to tensors inside a checkpoint; plain numbers and texts beside the tensors are dropped."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            raise ModelError(f"weights {path}: holds a {type(content).__name__}, not a mapping of names to tensors")
        inside = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        if len(inside) > 1:
            _log.info("%s holds %s; took %s", path, ", ".join(inside), inside[0])
        content = content[inside[0]]
    state = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    nested = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    if not state:
        where = f"; it has {_shorten(map(str, content))}" if content else ""
        raise ModelError(f"weights {path}: no tensors found{where}; known wrappers are {', '.join(_WRAPPERS)}")
    if nested:
        raise ModelError(f"weights {path}: tensors lie beside the groups {_shorten(nested)}; save one state_dict alone")
    return state


def _strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _check_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            bad = int((~torch.isfinite(tensor.float())).sum())
            raise ModelError(f"weights {path}: {name} has NaN or infinity in {bad} of {tensor.numel()} values")


def _fit_names(state: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop, or add, one leading name part that all names share when that alone makes the names agree."""
    if state.keys() == expected.keys() or not state or not expected:
        return state
    first = {name.split(".", 1)[0] for name in state if "." in name}
    if len(first) == 1:
        prefix = first.pop() + "."
        bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if bare.keys() == expected.keys():
            return bare
    first = {name.split(".", 1)[0] for name in expected}
    prefix = first.pop() + "."
    longer = {prefix + name: tensor for name, tensor in state.items()}
    return longer if not first and longer.keys() == expected.keys() else state


def _fill_aliases(state: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Give each missing name the tensor of another name that shares its memory in the module."""
    known = {_place(tensor): name for name, tensor in expected.items() if name in state and tensor.numel()}
    for name, tensor in expected.items():
        if name not in state and tensor.numel() and _place(tensor) in known:
            state[name] = state[known[_place(tensor)]]


def _check_names(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: str) -> None:
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    if not missing and not unexpected:
        return
    close = registry.near(unexpected[0], missing) if missing and unexpected else ""
    hint = f" ({unexpected[0]!r}{close})" if close else ""
    raise ModelError(
        f"{source}: the weights do not fit the network: of {len(expected)} tensors {len(missing)} missing"
        f"{_listed(missing)}, {len(unexpected)} unexpected{_listed(unexpected)}{hint}; a partial load is refused"
    )


def _listed(names: list[str]) -> str:
    return f" [{_shorten(names)}]" if names else ""


def _shorten(names: Iterable[str]) -> str:
    every = list(names)
    more = f", ... {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _line(error: BaseException) -> str:
    """The first line of an error's text, short."""
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__
