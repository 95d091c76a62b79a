"""Members: checkpoints as models in memory, and what checkpoint 0 starts from.

Members that are adapters share their base: it is loaded once, in bfloat16, and adapters are switched on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw_core.artifacts import adapters, checkpoint, pretrained
from tpaw_core.artifacts.checkpoint import Base
from tpaw_core.errors import TpawError
from tpaw_core.launch.source import Source
from tpaw_core.stages.context import Context
from tpaw_core.workspace.paths import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tpaw_core.config.params import Precision


class Start(NamedTuple):
    """What the parameters name as the model that checkpoint 0 starts from."""

    source: str  # of the whole model: a folder or a hub id
    revision: str | None
    name: str  # of the whole model, as the parameters or the adapter have it
    adapter: Path | None  # the folder of an adapter on it

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Where it is, and its revision: an adapter's own, if it brings one."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return str(self.adapter), None
        return self.source, self.revision

    def read(self, workspace: Workspace) -> dict[str, str]:
        """The files of an adapter and their digests."""
        paths = [] if self.adapter is None else [self.adapter / adapters.CONFIG, self.adapter / adapters.WEIGHTS]
        return dict(zip(map(str, paths), workspace.sha256s(paths), strict=True))

    def base(self, workspace: Workspace) -> Base:
        digest = checkpoint.base_digest(workspace, self.source, self.revision)
        return Base(source=self.name, revision=self.revision, digest=digest)


def start(context: Context) -> Start:
    """Of a recipe that names a model. Raises TpawError for an adapter that cannot be trained on, or without a base."""
    own, lora = context.params.model, context.params.lora
    assert own.model_name_or_path is not None
    source = context.source(own.model_name_or_path)
    folder = pretrained.adapter(source, own.revision) if lora else None
    if folder is None or lora is None:
        return Start(source, own.revision, own.model_name_or_path, None)
    config = adapters.read_config(folder)
    adapters.require(folder, lora)
    name = own.base or config.base_model_name_or_path
    if not name:
        raise TpawError(f"{folder}: this adapter does not say what its base is; set model.base to a folder or hub id")
    revision = None if own.base else config.revision
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not context.workspace.input(name).exists():
        raise TpawError(f"{folder}: the base of this adapter is not at {name}; set model.base to its folder or hub id")
    return Start(context.source(name), revision, name, folder)


def base_of(context: Context, iteration: int) -> tuple[Base, Path | None]:
    """The base of checkpoint ``iteration`` and the folder of its adapter; a whole checkpoint is a base, without one."""
    workspace = context.workspace
    folder, manifest = workspace.checkpoint(iteration), checkpoint.manifest(workspace, iteration)
    if manifest.base is None:
        return Base(source=workspace.name(folder), revision=None, digest=manifest.digest), None
    return manifest.base, folder


def place(context: Context, base: Base) -> tuple[str, str | None]:
    """Where a base is now, and its revision: the first place that its manifest or the parameters name with its digest.

    Raises TpawError where none does.
    """
    own, inside = context.params.model, context.workspace.place(base.source)
    places = [(base.source, base.revision), (own.base, None), (own.model_name_or_path, own.revision)]
    found: list[tuple[str, str | None]] = [(str(inside), None)] if inside.is_dir() else []
    found += [(context.source(name), revision) for name, revision in places if name is not None]
    why = {}
    for source, revision in dict.fromkeys(found):
        try:
            digest = checkpoint.base_digest(context.workspace, source, revision)
        except TpawError as error:
            why[source] = str(error)
            continue
        if digest == base.digest:
            return source, revision
        why[source] = f"{source}: is another model ({digest[:12]})"
    raise TpawError(
        f"the base of the adapters, {base.source} ({base.digest[:12]}), was not found: {'; '.join(why.values())}. "
        "Restore it (if it is a checkpoint, with `dvc checkout`), or set model.base to the folder it is in now"
    )


def need_servable(source: str, config: Any, dtype: Precision) -> None:
    """Raises TpawError for a base with this config that a server would load in other numbers than it is trained in."""
    stored = str(config.dtype).removeprefix("torch.")
    if dtype == "float32" and stored != "bfloat16":
        raise TpawError(
            "generation.dtype=float32: the adapters are trained on a base rounded to bfloat16, but vllm would not "
            f"round {source}, which is stored in {stored}; set generation.dtype=bfloat16"
        )


class Members:
    """Checkpoints to compute in ``dtype``. Under adapters a base is rounded to bfloat16 first."""

    def __init__(self, context: Context, dtype: Precision) -> None:
        self._context, self._dtype = context, dtype
        self._places: dict[str, tuple[str, str | None]] = {}  # of bases, by digest
        self._base: PreTrainedModel | None = None
        self._loaded: tuple[str, str | None] | None = None  # where it is from

    def source(self, iteration: int) -> Source:
        """From where any process loads the checkpoint.

        Raises TpawError for an adapter where the parameters train all weights, and where its base was not found.
        """
        base, adapter = self._parts(iteration)
        if self._context.params.lora is None:
            return Source(str(self._context.workspace.checkpoint(iteration).absolute()), dtype=self._dtype)
        if base.digest not in self._places:
            self._places[base.digest] = place(self._context, base)
        source, revision = self._places[base.digest]
        name = checkpoint.manifest(self._context.workspace, iteration).digest
        own = None if adapter is None else adapter.absolute()
        return Source(source, revision, self._dtype, is_base=True, adapter=own, name=name)

    def load(self, iteration: int, *, spread: bool = False) -> PreTrainedModel:
        """In evaluation mode. One object for all members on one base: it computes as the member loaded last.

        ``spread``: over all accelerators, where one is too small. Raises TpawError as `source`.
        """
        source = self.source(iteration)
        device = pretrained.roomy_device(source.place, source.revision, source.dtype) if spread else None
        if not source.is_base:
            return source.load(device=device)
        if self._base is None or self._loaded != (source.place, source.revision):
            self._base = None  # before there are two
            self._base, self._loaded = source.load_base(device=device), (source.place, source.revision)
        adapters.use(self._base, source.adapter, source.name)
        return self._base

    def served(self, iteration: int) -> tuple[str, tuple[Path, int] | None]:
        """For a server that loads by itself: the whole model, and the folder and rank of its adapter.

        Raises TpawError as `source`, and where a server would not load the base as it is trained.
        """
        found = self.source(iteration)
        if not found.is_base:
            return found.place, None
        need_servable(found.place, pretrained.load_config(found.place, found.revision), self._dtype)
        # A server takes a folder or a hub id.
        whole = found.place if found.revision is None else pretrained.snapshot(found.place, found.revision)
        return whole, None if found.adapter is None else (found.adapter, adapters.rank(found.adapter))

    def _parts(self, iteration: int) -> tuple[Base, Path | None]:
        base, adapter = base_of(self._context, iteration)
        if self._context.params.lora is None and adapter is not None:
            config = adapters.read_config(adapter)
            raise TpawError(
                f"{adapter}: is a LoRA adapter, but lora is null, so all weights would be trained; set "
                f"lora.r={config.r} lora.alpha={config.lora_alpha:g}, or recreate all checkpoints, "
                "starting with `tpaw sft`"
            )
        return base, adapter
