"""What people and later runs read: run folders, tables, pages and charts; imports nothing of ours."""
