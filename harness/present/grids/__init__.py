"""Tables ready to print: from results to headings and rows of text."""
