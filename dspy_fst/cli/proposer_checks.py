"""Checks of the proposer for `dspy-fst check`: it is missing, its key is not set, or its server does not answer."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dspy_fst.model_files.reach import why_silent

if TYPE_CHECKING:
    import dspy

    from dspy_fst.project.project_file import Opened, Project


def nobody_proposes(project: "Project") -> bool:
    """Whether the project searches and names neither a reflection LM nor a function."""
    method = project.recipe.method if project.recipe else "fst"
    return project.reflection_lm is None and project.propose is None and project.fast is None and method != "rl"


def proposer_warnings(project: "Project", opened: "Opened") -> Iterator[str]:
    """Problems of the proposer that a run would notice late or not at all."""
    if project.reflection_lm is None:
        if project.propose is not None:
            yield (
                f"reflection_lm is not set: instructions come from {project.propose} alone. For a task of your own "
                "name a strong LM, e.g. reflection_lm: openai/gpt-5, and write null in propose"
            )
        return
    name, lm = project.reflection_lm.model, opened.optimizer.reflection_lm
    if lm is not None and (missing := _missing_keys(name, lm)):
        yield (
            f"reflection_lm={name!r}: {' and '.join(missing)} is not set in the environment, so reflections will fail; "
            "set it, or name another variable with api_key_env"
        )


def unreached(opened: "Opened") -> Iterator[str]:
    """Warns of a reflection server of the user that does not answer now. It may still be started before the run."""
    lm = opened.optimizer.reflection_lm
    if lm is None:
        return
    address = lm.kwargs.get("api_base") or lm.kwargs.get("base_url")
    if address and (silence := why_silent(str(address))):
        yield (
            f"reflection_lm={lm.model!r}: {address} cannot be reached ({silence}), so reflections would fail; start "
            "the server, or correct api_base"
        )


def _missing_keys(name: str, lm: "dspy.LM") -> Sequence[str]:
    """Environment variables of the provider that are not set; none where the LM has its own key or address."""
    if lm.kwargs.get("api_key") or lm.kwargs.get("api_base"):
        return ()
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else litellm downloads a price list
    from dspy_fst.rollout.dspy_release import litellm_if_installed  # imports dspy

    litellm = litellm_if_installed()
    if litellm is None:
        return ()
    missing: list[str] = litellm.validate_environment(name)["missing_keys"]
    return missing
