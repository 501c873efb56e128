"""A page that runs a bundle in a browser, what puts it together, and a server to try it with. See README.md here."""
