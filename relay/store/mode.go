package store

import "github.com/jackc/pgx/v5"

const execMode = pgx.QueryExecModeCacheDescribe
