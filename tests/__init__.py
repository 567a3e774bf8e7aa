"""The tests mirror the three packages; this file keeps their folders from standing in for them on the import path."""
