"""The one exception of the data package."""


class DataError(ValueError):
  """Data that cannot be used; one sentence names the file and the fault."""
