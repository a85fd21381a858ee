"""From texts to rows: ids, items in columns, which row, in what layout."""
