"""The page of a report: a module a section gives its data, and the script of the same name draws it."""
