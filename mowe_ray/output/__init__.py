"""Run folders, tables, HTML pages and charts; imports no other package of this project."""
