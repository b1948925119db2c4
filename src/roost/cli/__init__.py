"""The command line: one module a verb group, loaded when the verb is used.

`main` knows the verbs' names and help texts and nothing else; `frame` turns errors into exit codes; `output` prints.
A verb module imports at its top what costs nothing (typer is there already) and the rest inside its functions.
"""
