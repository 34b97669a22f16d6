"""Reading a dense checkpoint whose blocks equal those of a Mixtral, except for the FFN.

``llama`` and ``mistral`` can be represented exactly: rotary positions of every kind, grouped
queries, sliding windows and tied embeddings mean the same in both. Mixtral has no biases, so a
llama with ``attention_bias`` or ``mlp_bias`` and all of Qwen2 are refused, never approximated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ...proto.errors import CheckpointError, UnsupportedModel
from .gguf_parts import is_part, join_parts

SUPPORTED = ("llama", "mistral")
# Files that are copied besides the weights; a new config.json is written.
SIDE_FILES = (
    "*token*",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
READ_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class DenseCheckpoint:
    """A folder of safetensors or a GGUF file that passed all checks except those of its tensors."""

    path: Path
    config: Any
    # Arguments of transformers' from_pretrained that name the checkpoint.
    folder: Path
    options: dict[str, Any]

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    def load_model(self) -> Any:
        """Load the model on the CPU, in its own dtype from safetensors or in fp32 from GGUF."""
        weights = {"dtype": "float32"} if self.is_gguf else {"dtype": "auto"}
        with quiet_transformers():
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    **self.options,
                    **weights,
                    output_loading_info=True,
                    # The error below can name the tensor.
                    ignore_mismatched_sizes=True,
                )
            except READ_ERRORS as exc:
                raise CheckpointError(f"{self.path}: cannot read its weights: {exc}") from exc
        model, info = loaded
        for name, found, expected in sorted(info["mismatched_keys"]):
            raise CheckpointError(
                f"{self.path}: {name} has shape {tuple(found)}, its configuration says "
                f"{tuple(expected)}; config.json or the tensors belong to another model"
            )
        if info["missing_keys"]:
            raise CheckpointError(
                f"{self.path}: tensors are missing: {_some(info['missing_keys'])}; "
                "the download or copy is incomplete, or the file is one part of a model"
            )
        if info["unexpected_keys"]:
            raise UnsupportedModel(
                f"{self.path}: a Mixtral cannot hold these tensors: "
                f"{_some(info['unexpected_keys'])}"
            )
        return model.eval()

    def load_tokenizer(self) -> Any:
        with quiet_transformers():
            try:
                return AutoTokenizer.from_pretrained(self.folder, **self.options)
            except READ_ERRORS as exc:
                raise CheckpointError(f"{self.path}: cannot read its tokenizer: {exc}") from exc

    def copy_side_files(self, out: Path, model: Any, tokenizer: Any | None) -> None:
        """Copy tokenizer, chat template, generation config and licence, verbatim if from files."""
        if self.is_gguf:
            # transformers would save these facts about the GGUF's place with the tokenizer.
            for key in ("is_local", "local_files_only"):
                tokenizer.init_kwargs.pop(key, None)  # pyright: ignore[reportOptionalMemberAccess]
            tokenizer.save_pretrained(out)  # pyright: ignore[reportOptionalMemberAccess]
            model.generation_config.save_pretrained(out)
            return
        for pattern in SIDE_FILES:
            for source in sorted(self.folder.glob(pattern)):
                if source.is_dir():
                    shutil.copytree(source, out / source.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(source, out / source.name)


@contextmanager
def open_dense(path: Path) -> Iterator[DenseCheckpoint]:
    """Open the checkpoint at ``path``, or raise the reason why it cannot become a Mixtral.

    A GGUF that is split into parts is one file for as long as it is open.
    """
    if not path.exists():
        raise CheckpointError(
            f"dense: {path} does not exist; give a folder with config.json and *.safetensors or a "
            ".gguf file (a model of the Hugging Face hub: run `hf download NAME` first)"
        )
    with join_parts(path) if path.is_file() and is_part(path) else nullcontext(path) as whole:
        options: dict[str, Any] = {"local_files_only": True}
        if whole.is_file():
            _check_gguf(whole)
            folder = whole.parent
            options["gguf_file"] = whole.name
        else:
            _check_folder(whole)
            folder = whole
            options["use_safetensors"] = True
        try:
            config = AutoConfig.from_pretrained(folder, **options)
        except (*READ_ERRORS, TypeError, StrictDataclassError) as exc:
            raise CheckpointError(f"{path}: its configuration is not valid: {exc}") from exc
        _check_representable(path, config)
        yield DenseCheckpoint(path=path, config=config, folder=folder, options=options)


def _check_folder(path: Path) -> None:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"dense: {path} is not a model folder: it has no config.json")
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise CheckpointError(f"{config_file}: not JSON: {exc}") from exc
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in SUPPORTED:
        raise UnsupportedModel(_unsupported(config_file, f"model_type: {model_type!r}"))
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise UnsupportedModel(
            f"{config_file}: quantization_config: weights quantised with {method!r} cannot be "
            "copied and varied; give the unquantised checkpoint"
        )
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(
                f"{file}: truncated or damaged: {exc}; copy or download it again"
            ) from exc
    if not files:
        if parts := sorted(path.glob("*.gguf")):
            raise CheckpointError(
                f"dense: {path} has no *.safetensors; give its GGUF file, {parts[0]}"
            )
        raise CheckpointError(
            f"dense: {path} has no *.safetensors; pickled weights are never read: load the model "
            "with transformers and save it again with save_pretrained"
        )


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(
                f"dense: {path} is not a GGUF file; give a .gguf file or a model folder"
            )
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if _short(field)}
        tensors = [tensor.name for tensor in reader.tensors]
    except READ_ERRORS as exc:
        raise CheckpointError(f"{path}: truncated or damaged GGUF: {exc}") from exc
    arch = fields.get("general.architecture")
    if arch not in SUPPORTED:
        raise UnsupportedModel(_unsupported(path, f"general.architecture: {arch!r}"))
    if fields.get(f"{arch}.expert_count"):
        raise UnsupportedModel(
            f"{path}: {arch}.expert_count: {fields[f'{arch}.expert_count']}: "
            "the model already has experts"
        )
    # transformers reads neither of these from a GGUF, and would load a different model.
    scaling = fields.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise UnsupportedModel(
            f"{path}: {arch}.rope.scaling.type: {scaling!r}"
            f"{' with rope_freqs.weight' if 'rope_freqs.weight' in tensors else ''}: transformers "
            "drops rope scaling when it reads a GGUF; give the safetensors folder of this model"
        )
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        raise UnsupportedModel(f"{path}: {_some(biases)}: Mixtral has no biases")


def _short(field: Any) -> bool:
    # A vocabulary has 50,000 entries or more, which are not needed here.
    return len(field.data) == 1


def _check_representable(path: Path, config: Any) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UnsupportedModel(f"{path}: {name}: true: Mixtral has no biases")


def _unsupported(where: Path, what: str) -> str:
    reason = "its attention has biases, Mixtral's has none" if "qwen2" in what else ""
    return (
        f"{where}: {what} cannot become a Mixtral exactly"
        f"{f' ({reason})' if reason else ''}; supported are {', '.join(SUPPORTED)}"
    )


def _some(names: Any, most: int = 3) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; the caller shows its own progress."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The bar for GGUF tensors ignores the setting; errors are raised, not printed.
        with redirect_stderr(StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
