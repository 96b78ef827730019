"""The run-time type checker of the tests: shapes by jaxtyping, everything else by beartype."""

from beartype import BeartypeConf, beartype

# A whole number is a fine learning rate.
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
