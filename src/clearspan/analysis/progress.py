"""Until all of analysis imports `clearspan.progress`."""

from clearspan.progress import Progress as Progress
from clearspan.progress import silent as silent
