"""BM25 search over documents with a title and a text."""

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s  # type: ignore[import-untyped]

from programs.common import reaching
from programs.hover.world import Document

WIKIPEDIA = ("dspy/cache", "wiki.abstracts.2017.tar.gz", "wiki.abstracts.2017.jsonl")
"""Hub repository, archive and member: the first paragraphs of Wikipedia in 2017, five million, licence CC BY-SA.
HoVer's claims are about these."""
WIKIPEDIA_REVISION = "main"
"""Unpinned: the commit could not be looked up when this was written; put it here for a run that counts."""


class Retriever:
    """A search engine. All copies of a program share it: it is large and never changes."""

    def __init__(self, index: Any, documents: Sequence[Document]):
        self._index, self._documents = index, documents

    @classmethod
    def over(cls, documents: Sequence[Document]) -> "Retriever":
        """Index documents that fit into memory."""
        index = bm25s.BM25()
        texts = [f"{document['title']} {document['text']}" for document in documents]
        index.index(_tokens(texts), show_progress=False)
        return cls(index, documents)

    @classmethod
    def load(cls, folder: Path) -> "Retriever":
        """What `save` wrote, mapped into memory instead of read."""
        index = bm25s.BM25.load(folder, load_corpus=True, mmap=True, show_progress=False)
        documents, index.corpus = index.corpus, None  # so that a search gives numbers of documents
        return cls(index, documents)

    def save(self, folder: Path) -> None:
        """Write index and documents, whole or not at all."""
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        self._index.save(partial, corpus=self._documents, show_progress=False)
        partial.rename(folder)

    def search(self, query: str, count: int) -> list[Document]:
        """The best documents first, at most `count`; one that shares no word with the query is none."""
        count = min(count, len(self._documents))
        numbers, scores = self._index.retrieve(_tokens([query]), k=count, show_progress=False)
        return [self._documents[int(n)] for n, score in zip(numbers[0], scores[0], strict=True) if score > 0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Retriever":
        return self


def _tokens(texts: list[str]) -> Any:
    return bm25s.tokenize(texts, show_progress=False)


def wikipedia(folder: Path | None = None) -> Retriever:
    """The search engine over Wikipedia.

    The first call downloads half a gigabyte and indexes five million documents in memory. Later calls take the index
    from `folder`, by default ~/.cache/dspy_fst/wiki.abstracts.2017.

    Raises:
        OSError: the archive cannot be reached.
    """
    folder = folder or Path.home() / ".cache" / "dspy_fst" / "wiki.abstracts.2017"
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        repository, archive, member = WIKIPEDIA
        with reaching(repository, WIKIPEDIA_REVISION):
            path = hf_hub_download(repository, archive, revision=WIKIPEDIA_REVISION)
        folder.parent.mkdir(parents=True, exist_ok=True)
        Retriever.over(read_archive(Path(path), member)).save(folder)
    return Retriever.load(folder)


def read_archive(path: Path, member: str) -> list[Document]:
    """The documents of a tar archive that holds a file of JSON lines {title, text: [sentence, ...]}."""
    with tarfile.open(path) as archive:
        lines = archive.extractfile(member)
        if lines is None:
            raise ValueError(f"{path}: {member} is no file")
        rows = (json.loads(line) for line in lines)
        return [Document(title=row["title"], text=" ".join(row["text"])) for row in rows]
