"""Write one self-contained file that loads a conversion without this package, under trust_remote_code=True.

The file is made of the package's source: the definitions of the variants (`weights`, O(n^2)) and all that these
need, without the fast forms and the constant-size state, and below them `portable_runtime.txt`, which puts the
variants on the model. The file gives the same numbers up to rounding, at the cost of softmax or more.
"""

import ast
import copy
import functools
import importlib.util
import inspect as python_inspect
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from ..attentions import LinearAttention
from ..attentions.groups import Groups
from ..attentions.hybrid import Hybrid, hybrid_of
from ..config import GUARD, known_architectures
from ..errors import UsageError
from ..integration.swapping import swapped_modules
from ..sources.files import write_whole

FILE = "modeling_attnswap.py"
# The families that it was tested on.
FAMILIES = ("llama", "mistral", "qwen2")
# Methods of the fast forms, which no definition needs.
_LEFT_OUT = {"forward", "calibrate", "tiles", "new_tokens", "_divide", "answer", "answered_by", "operations"}


def add(folder: str | Path) -> Path:
    """Write `modeling_attnswap.py` into the folder of a saved conversion, name it in config.json, and return its path.

    Only language models of `FAMILIES` can be portable.

    Raises:
        UsageError: another kind of model, or a variant that is not defined by its scores alone.
    """
    folder = Path(folder)
    path = write_whole(folder / FILE, text_of(folder).encode())
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (architecture,) = known_architectures(saved)
    saved["auto_map"] = {"AutoModelForCausalLM": f"{FILE.removesuffix('.py')}.Swapped{architecture}"}
    write_whole(folder / "config.json", f"{json.dumps(saved, indent=2, sort_keys=True)}\n".encode())
    return path


def text_of(folder: Path) -> str:
    """Return what `add` writes for the conversion in `folder`; errors as there."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = (config.architectures or [""])[0]
    if config.model_type not in FAMILIES or not architecture.endswith("ForCausalLM"):
        raise UsageError(
            f"{architecture or config.model_type} cannot be portable: only language models of {', '.join(FAMILIES)} can"
        )
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    return _source(model, architecture)


def with_portable(original):
    """Wrap `PreTrainedModel.save_pretrained`, so that it takes the argument `portable`.

    The wrapped method raises UsageError for `portable=True` on a model that is not swapped, or with `push_to_hub=True`.
    """

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, portable: bool = False, **kwargs):
        if portable and not swapped_modules(self):
            raise UsageError("portable=True is for swapped models, and this one is not swapped")
        if portable and kwargs.get("push_to_hub"):
            raise UsageError("portable=True with push_to_hub=True: save it first, then run `attnswap push`")
        named = getattr(self.config, "auto_map", None) or {}
        if not portable and not self.is_remote_code() and any(FILE[:-3] in str(name) for name in named.values()):
            del self.config.auto_map  # of the folder that it came from; this one gets no such file
        original(self, save_directory, *args, **kwargs)
        if portable:
            add(save_directory)

    return save_pretrained


def _source(model: PreTrainedModel, architecture: str) -> str:
    """Return the text of the whole file for a swapped model."""
    modules: dict[str, tuple[Any, ...]] = {}  # by the path of the attention module
    made: dict[str, str] = {}  # how the class of each variant is had
    roots: list[Any] = []
    for path, variant in swapped_modules(model).items():
        parted = isinstance(variant, Groups)
        parts = [part for part, _ in variant.each()] if isinstance(variant, Groups) else [variant]
        for part in parts:
            cls = type(part)
            linear = cls.linear_class if issubclass(cls, Hybrid) else cls
            alone = not issubclass(linear, LinearAttention) or linear.prepare is _PREPARE
            if variant.kind != "causal" or part.unrotate or not alone:
                name = f"{variant.kind} {cls.name}"
                raise UsageError(f"{path} cannot be portable: {name} is not defined by its scores alone")
            roots += [linear] if linear is cls else [linear, hybrid_of]
            made[cls.name] = linear.__name__ if linear is cls else f"hybrid_of({linear.__name__})"
        roots += [Groups] if parted else []
        named = ("groups", variant.choice()) if parted else variant.choice()
        modules[path] = (*named, *vars(variant.heads).values())
    runtime = Path(__file__).with_name("portable_runtime.txt").read_text(encoding="utf-8")
    imports, definitions = _Shaken(roots).text()
    table = "".join(f"    {name!r}: {entry!r},\n" for name, entry in modules.items())
    variants = "".join(f"    {name!r}: {expression},\n" for name, expression in made.items())
    return "\n".join(
        [
            f'"""{architecture} with swapped attention, without hf_attnswap: the definitions, O(n^2).',
            "",
            f"Written by hf_attnswap {version('hf_attnswap')} from its own source, which also has the fast forms: pip",
            'install hf_attnswap. Apache-2.0.\n"""',
            "",
            "import sys",
            imports,
            f"from transformers import AttentionInterface, {architecture}",
            "from transformers.masking_utils import AttentionMaskInterface, sdpa_mask",
            "",
            definitions,
            f"\nVARIANTS = {{\n{variants}}}",
            "# What stands where: a variant and its options, or those of groups; query heads, key/value heads, head",
            "# dimension, value dimension.",
            f"SWAPPED = {{\n{table}}}",
            f"GUARD = {GUARD!r}\n",
            runtime.replace("Architecture", architecture),
        ]
    )


_PREPARE = LinearAttention.prepare


class _Shaken:
    """Hold the part of the package's source that some of its objects need."""

    def __init__(self, roots: list[Any]):
        self.needed: dict[str, set[str]] = {}  # by module
        self.uses: dict[str, list[str]] = {}  # the modules that a module builds on
        self.external: set[str] = set()
        self.trees: dict[str, ast.Module] = {}
        for root in roots:
            self._need(root.__module__, root.__name__)

    def text(self) -> tuple[str, str]:
        """Return the import statements, and the definitions."""
        owner: dict[str, str] = {}
        parts = []
        for module in self._ordered():
            for node in self._tree(module).body:
                names = _bound(node) & self.needed[module]
                for name in names:
                    if owner.setdefault(name, module) != module:
                        raise UsageError(f"{name} is defined in {owner[name]} and in {module}: rename one")
                if names:
                    parts.append(ast.unparse(_without(node)))
        return "\n".join(sorted(self.external)), "\n\n\n".join(parts)

    def _tree(self, module: str) -> ast.Module:
        if module not in self.trees:
            self.trees[module] = ast.parse(python_inspect.getsource(sys.modules[module]))
        return self.trees[module]

    def _need(self, module: str, name: str) -> None:
        if name in self.needed.setdefault(module, set()):
            return
        for node in self._tree(module).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                if name in _bound(node):
                    package = sys.modules[module].__package__
                    source = importlib.util.resolve_name(f"{'.' * node.level}{node.module}", package)
                    self.uses.setdefault(module, []).append(source)
                    self._need(source, name)
                    return
            elif name in _bound(node):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    self.external.add(ast.unparse(_only(node, name)))
                    return
                self.needed[module].add(name)
                for other in {n.id for n in ast.walk(_without(node)) if isinstance(n, ast.Name)} - {name}:
                    self._need(module, other)

    def _ordered(self) -> list[str]:
        """Return the modules, each after those on which it builds."""
        order: list[str] = []

        def visit(module: str) -> None:
            for other in self.uses.get(module, ()):
                visit(other)
            if module not in order:
                order.append(module)

        for module in sorted(self.needed):
            visit(module)
        return order


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {node.target.id} if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else set()


def _only(node: ast.Import | ast.ImportFrom, name: str) -> ast.stmt:
    names = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) == name]
    return ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)


def _without(node: ast.stmt) -> ast.stmt:
    """Return a definition without its fast forms and its registration."""
    if not isinstance(node, ast.ClassDef):
        return node
    variant = any(isinstance(base, ast.Name) and base.id != "Module" for base in node.bases) or node.name == "Mask"
    left_out = _LEFT_OUT if variant or node.name == "Attention" else set()
    body = [item for item in node.body if not (isinstance(item, ast.FunctionDef) and item.name in left_out)]
    decorators = [d for d in node.decorator_list if not (isinstance(d, ast.Name) and d.id == "register")]
    shortened = copy.copy(node)
    shortened.body, shortened.decorator_list = body, decorators
    return shortened
