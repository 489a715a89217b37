"""The laboratory: photos and data sets, evaluation, tables of results, summaries, pictures and the explorer.

It builds on the core, which knows nothing of it. Needs the extra `lab`.
"""
