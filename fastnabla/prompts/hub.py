"""Prompts in a column of a data set on the Hugging Face Hub."""

from fastnabla.prompts.columns import column_of
from fastnabla.prompts.entries import Entries


def read_hub(name: str, column: str | None, split: str) -> Entries:
    """Read a column of a data set on the Hub; rows count from 0. Requires the package datasets.

    Args:
        name: OWNER/NAME.
        column: see `column_of`. NAME.FIELD is a field of a column of structures.
        split: such as train.

    Raises:
        ValueError: datasets is not installed, the data set cannot be loaded, or it has no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"the package datasets cannot be imported ({error}); run: pip install datasets") from error
    try:
        table = load_dataset(name, split=split)
        if column is not None and column not in table.column_names:
            table = table.flatten()  # a column of structures becomes one column per field, NAME.FIELD
        names = table.column_names
    except Exception as error:  # the hub, the network and a dozen file formats raise all kinds
        raise _cannot_load(name, split, error) from error
    column = column_of(names, column)
    try:
        values = table[column][:]
    except Exception as error:
        raise _cannot_load(name, split, error) from error
    return [(f"row {row}", value) for row, value in enumerate(values)]


def _cannot_load(name: str, split: str, error: Exception) -> ValueError:
    return ValueError(
        f"the split {split!r} of {name!r} cannot be loaded ({error}); check your connection, and both names at "
        f"https://huggingface.co/datasets/{name}."
    )
