"""How at least once recognises what was handled before: between its loop and the stores and inboxes of ``dedup``."""
