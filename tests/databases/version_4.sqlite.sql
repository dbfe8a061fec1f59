-- A server's database of schema version 4, with one account.
CREATE TABLE mechanex_schema (
  version INTEGER NOT NULL,
  PRIMARY KEY (version)
);
CREATE TABLE mechanex_users (
  id VARCHAR(32) NOT NULL,
  email VARCHAR(320),
  password_hash TEXT,
  model_name TEXT,
  created_at DOUBLE NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (email)
);
CREATE TABLE mechanex_api_keys (
  id VARCHAR(32) NOT NULL,
  user_id VARCHAR(32) NOT NULL,
  name TEXT NOT NULL,
  key_hash VARCHAR(64) NOT NULL,
  shown VARCHAR(16) NOT NULL,
  created_at DOUBLE NOT NULL,
  last_used DOUBLE,
  PRIMARY KEY (id),
  FOREIGN KEY(user_id) REFERENCES mechanex_users (id) ON DELETE CASCADE,
  UNIQUE (key_hash)
);
CREATE INDEX ix_mechanex_api_keys_user_id ON mechanex_api_keys (user_id);
CREATE TABLE mechanex_sessions (
  id VARCHAR(32) NOT NULL,
  user_id VARCHAR(32) NOT NULL,
  created_at DOUBLE NOT NULL,
  expires_at DOUBLE NOT NULL,
  revoked_at DOUBLE,
  PRIMARY KEY (id),
  FOREIGN KEY(user_id) REFERENCES mechanex_users (id) ON DELETE CASCADE
);
CREATE INDEX ix_mechanex_sessions_expires_at ON mechanex_sessions (expires_at);
CREATE INDEX ix_mechanex_sessions_user_id ON mechanex_sessions (user_id);
CREATE TABLE mechanex_vectors (
  id VARCHAR(32) NOT NULL,
  user_id VARCHAR(32) NOT NULL,
  created_at DOUBLE NOT NULL,
  PRIMARY KEY (id),
  FOREIGN KEY(user_id) REFERENCES mechanex_users (id) ON DELETE CASCADE
);
CREATE INDEX ix_mechanex_vectors_user_id ON mechanex_vectors (user_id);
CREATE TABLE mechanex_behaviors (
  id VARCHAR(32) NOT NULL,
  user_id VARCHAR(32) NOT NULL,
  behavior_name VARCHAR(200) NOT NULL,
  description TEXT NOT NULL,
  vector_id VARCHAR(32) NOT NULL,
  examples TEXT NOT NULL,
  n_examples INTEGER NOT NULL,
  created_at DOUBLE NOT NULL,
  watched TEXT,
  PRIMARY KEY (id),
  CONSTRAINT mechanex_behaviors_one_name UNIQUE (user_id, behavior_name),
  FOREIGN KEY(user_id) REFERENCES mechanex_users (id) ON DELETE CASCADE,
  FOREIGN KEY(vector_id) REFERENCES mechanex_vectors (id)
);
CREATE INDEX mechanex_behaviors_vector ON mechanex_behaviors (vector_id);
CREATE TABLE mechanex_refresh_tokens (
  token_hash VARCHAR(64) NOT NULL,
  session_id VARCHAR(32) NOT NULL,
  used_at DOUBLE,
  access_hash VARCHAR(64),
  access_expires_at DOUBLE,
  PRIMARY KEY (token_hash),
  FOREIGN KEY(session_id) REFERENCES mechanex_sessions (id) ON DELETE CASCADE
);
CREATE INDEX ix_mechanex_refresh_tokens_session_id ON mechanex_refresh_tokens (session_id);
CREATE UNIQUE INDEX mechanex_refresh_tokens_access ON mechanex_refresh_tokens (access_hash);
INSERT INTO mechanex_schema (version) VALUES (4);
INSERT INTO mechanex_users (id, created_at) VALUES ('local', 0.0);
INSERT INTO mechanex_users (id, email, password_hash, created_at) VALUES ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'ann@example.org', '$argon2id$v=19$m=64,t=1,p=1$mYYsijVhmlYxjvwT8T7hyA$8GS92nek16lpYr4YxY3Rl/iZmghX6GGyuLBGthKNFII', 1790000000.0);
INSERT INTO mechanex_sessions (id, user_id, created_at, expires_at) VALUES ('55555555555555555555555555555555', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 1790000000.0, 4000000000.0);
INSERT INTO mechanex_refresh_tokens (token_hash, session_id, access_hash, access_expires_at) VALUES ('fa7ed632d944fbbb3dc849927ae8ea526db23ed1b9ffd9d5a9ed355a7544ee54', '55555555555555555555555555555555', 'ae146ab22bc97c4d18ef10b0b2f814e00a398684d45c4794275ae845599875bf', 4000000000.0);
INSERT INTO mechanex_api_keys (id, user_id, name, key_hash, shown, created_at) VALUES ('cccccccccccccccccccccccccccccccc', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'laptop', 'e129d750f17e5f2d589ab804e83d489949788a2649f0956cc0bdf550955bbf06', 'mx-today', 1790000000.0);
INSERT INTO mechanex_vectors (id, user_id, created_at) VALUES ('eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 1790000000.0);
INSERT INTO mechanex_behaviors (id, user_id, behavior_name, description, vector_id, examples, n_examples, created_at) VALUES ('bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'calm', 'Calm answers.', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', '{"prompts": ["Hi"], "positive_answers": ["Calm"], "negative_answers": ["Angry"]}', 1, 1790000000.0);
