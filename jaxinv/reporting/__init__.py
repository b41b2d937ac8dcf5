"""From rows to statistics, tables, figures and one page."""
