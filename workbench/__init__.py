"""Workbench for chest-radiograph models: CheXNet on NIH ChestX-ray14, trained with Horovod on MPI ranks.

Importing this package imports nothing heavy; each wing is imported by its own name:

    from workbench.data import chestxray14, shards, pipeline
    from workbench.training import cluster
    from workbench.analysis import evaluation, plots
"""

__version__ = "0.1.0"


def one_line(text: str) -> str:
    """A text to be shown that quotes a file or a library: without its line ends, control codes and megabytes."""
    said = "".join(character if character.isprintable() else " " for character in text)
    return said if len(said) <= 2000 else f"{said[:1200]} … {said[-600:]}"


class WorkbenchError(Exception):
    """An error that a user can cause and mend, told in one sentence.

    The sentence says what is wrong, with the value and the place, and what to do. The command line and the
    notebooks show it without a traceback; everything else that is raised is a bug of ours.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())

    def _render_traceback_(self) -> list[str]:
        # IPython asks an exception for this; in a notebook the sentence says more than the stack.
        return [f"{type(self).__name__}: {self}"]


class Interrupted(WorkbenchError):
    """The user asked to stop, and it stopped where nothing is half done; the sentence says where and how to go on."""
