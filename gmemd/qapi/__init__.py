"""The QAPI compiler: from the source in gmemd/schema/qapi to what is loaded at run time. Used at build time only."""
