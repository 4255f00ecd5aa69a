"""From a file to a batch: sources, formats, chat templates, loss masks, packing, collation."""
