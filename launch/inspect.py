"""`einkorn inspect`: what training sees of the data, token by token."""

from configs.load import Loaded
from input_pipeline.inspect import print_histogram, print_row
from launch import assemble
from launch.data import first_rows


def run(loaded: Loaded, *, rows: int, split: str) -> None:
    """Print the first rows of a split with the trained tokens coloured, then how long its rows are."""
    from rich.console import Console

    config = loaded.config
    if split not in ("train", "validation"):
        raise ValueError(f"--split is {split!r}; allowed: train, validation")
    if not config.data[split].datasets:
        raise ValueError(f"data.{split}.datasets is empty")
    model = assemble.open_model(config)
    data = first_rows(config, split, model)
    console = Console()
    for row in range(min(rows, len(data.store))):
        print_row(console, data, row, model.tokenizer)
        console.print()
    print_histogram(console, data)
