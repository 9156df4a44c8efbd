"""Files of callers, and records of what they have asked for, in a folder or in memory."""
